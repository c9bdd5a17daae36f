// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/cli/command_test.h"
#include "tests/cli/program.h"
#include "tests/cli/random_model.h"
#include "tests/models/gguf_model.h"

namespace natslm::test {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;
using Type = GgufFile::ValueType;

constexpr const char* kTemplate = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}";

class Export : public CommandTest {
 protected:
  static void SetUpTestSuite() {
    CommandTest::SetUpTestSuite();
    write_model(*scratch_ / "llama", {.architecture = "llama", .set = roles::RoleSet::kDense});
    write_file(*scratch_ / "llama" / "tokenizer_config.json",
               Json({{"chat_template", kTemplate}, {"eos_token", "<|endoftext|>"}}).dump());
    write_file(*scratch_ / "llama" / "generation_config.json", R"({"temperature": 0.5})");
    write_model(*scratch_ / "own");
  }
  static Outcome run(const std::string& model, const std::string& out,
                     std::vector<std::string> more = {}) {
    more.insert(more.begin(), {"export", "--model", path(model), "--out", path(out)});
    return run_program(more);
  }
  static std::string generated(const std::string& model) {
    const Outcome outcome =
        run_program({"generate", "--model", path(model), "--prompt", "the next key reads",
                     "--max-new-tokens", "24", "--json", path("generated.json")});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return Json::parse(read_file(path("generated.json")))["results"]["text"];
  }
};

// The vocabulary of a folder's byte-level tokenizer.json.
void add_vocabulary(const fs::path& folder, GgufBuilder& file) {
  const Json json = Json::parse(read_file(folder / "tokenizer.json"));
  std::map<int32_t, std::string> tokens;
  for (const auto& [name, id] : json["model"]["vocab"].items()) tokens[id.get<int32_t>()] = name;
  std::map<int32_t, int32_t> types;
  for (const auto& [id, name] : tokens) types[id] = 1;
  for (const Json& token : json["added_tokens"]) {
    tokens[token["id"].get<int32_t>()] = token["content"].get<std::string>();
    types[token["id"].get<int32_t>()] = 3;
  }
  std::string names, kinds, merges;
  for (const auto& [id, name] : tokens) names += raw(name), kinds += raw(types[id]);
  for (const Json& merge : json["model"]["merges"]) {
    merges +=
        raw(merge.is_string() ? merge.get<std::string>()
                              : merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  file.value("tokenizer.ggml.model", Type::kString, raw("gpt2"))
      .value("tokenizer.ggml.pre", Type::kString, raw("gpt-2"))
      .array("tokenizer.ggml.tokens", Type::kString, tokens.size(), names)
      .array("tokenizer.ggml.merges", Type::kString, json["model"]["merges"].size(), merges)
      .array("tokenizer.ggml.token_type", Type::kI32, tokens.size(), kinds)
      .value("tokenizer.ggml.eos_token_id", Type::kU32,
             raw(static_cast<uint32_t>(tokens.rbegin()->first)))
      .value("tokenizer.chat_template", Type::kString, raw(kTemplate));
}

TEST_F(Export, AFolderComesOutWithAllThatBelongsToIt) {
  const Outcome outcome = run("llama", "again", {"--json", path("out.json")});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("float32"));
  EXPECT_THAT(outcome.out, HasSubstr("chat template"));
  for (const char* file :
       {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"})
    EXPECT_EQ(read_file(*scratch_ / "again" / file), read_file(*scratch_ / "llama" / file)) << file;
  EXPECT_EQ(generated("again"), generated("llama"));
  const Json results = Json::parse(read_file(path("out.json")))["results"];
  EXPECT_EQ(results["architecture"], "llama");
  EXPECT_EQ(results["bytes"], results["weights"].get<int64_t>() * 4);
}

TEST_F(Export, AGgufFileComesOutAsTheFolderItWasMadeOf) {
  GgufBuilder gguf;
  add_vocabulary(*scratch_ / "llama", gguf);
  models::GgufModel(*scratch_ / "llama", gguf);
  write_file(*scratch_ / "llama.gguf", gguf.bytes());
  const Outcome outcome = run("llama.gguf", "from_gguf");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(read_file(*scratch_ / "from_gguf" / "model.safetensors"),
            read_file(*scratch_ / "llama" / "model.safetensors"));
  const Json tokenizer = Json::parse(read_file(*scratch_ / "from_gguf" / "tokenizer_config.json"));
  EXPECT_EQ(tokenizer["chat_template"], kTemplate);
  EXPECT_EQ(tokenizer["eos_token"], "<|endoftext|>");
  EXPECT_EQ(generated("from_gguf"), generated("llama"));
}

TEST_F(Export, TheTypeIsTheFilesOrTheOneAskedFor) {
  const auto dtype = [](const std::string& folder) {
    return Json::parse(read_file(*scratch_ / folder / "config.json"))["torch_dtype"];
  };
  for (const char* type : {"bfloat16", "float16"}) {
    ASSERT_EQ(run("llama", type, {"--dtype", type}).exit_code, 0);
    EXPECT_EQ(dtype(type), type);
    const std::string again = std::string(type) + "_again";
    ASSERT_EQ(run(type, again).exit_code, 0);
    EXPECT_EQ(dtype(again), type);
    EXPECT_EQ(read_file(*scratch_ / again / "model.safetensors"),
              read_file(*scratch_ / type / "model.safetensors"));
  }
}

TEST_F(Export, WhatCannotBeDoneGetsOneClearLine) {
  expect_error(run("own", "out"), 1, "is no pretrained model");
  expect_error(run("nothing", "out"), 1, "is no pretrained model");
  expect_error(run("llama", "llama"), 1, "choose another folder for --out");
  expect_error(run("llama", "llama/config.json"), 1, "the folder cannot be made");
  EXPECT_EQ(run("llama", "out", {"--dtype", "int8"}).exit_code, 2);
}

}  // namespace
}  // namespace natslm::test
