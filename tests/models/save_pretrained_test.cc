// Pretrained models written back: what comes out is what `transformers` wrote of the same model.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/save_pretrained.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <c10/core/GradMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "natslm/models/models.h"
#include "tests/models/gguf_model.h"
#include "tests/models/golden_models.h"
#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using test::error_of;
using test::ScratchFolder;
using ::testing::HasSubstr;

Json json_of(const fs::path& file) {
  std::ifstream stream(file);
  return Json::parse(stream);
}

void expect_same_parameters(const Model& a, const Model& b) {
  ASSERT_EQ(a.parameters().size(), b.parameters().size());
  for (size_t i = 0; i < a.parameters().size(); ++i) {
    EXPECT_EQ(a.parameters()[i].first, b.parameters()[i].first);
    EXPECT_TRUE(at::equal(a.parameters()[i].second, b.parameters()[i].second))
        << a.parameters()[i].first;
  }
}

class SavedCase : public ::testing::TestWithParam<std::string> {
 protected:
  const Json& a_case() const { return case_named(GetParam()); }
  fs::path source() const { return write_folder(a_case()); }
  ScratchFolder scratch_;
  const fs::path out_ = scratch_ / "saved";
};

TEST_P(SavedCase, HasTheReferencesTensorsByNameShapeTypeAndBits) {
  save_pretrained(*open_pretrained(source(), {.type = at::kBFloat16}), out_,
                  {.type = at::kBFloat16});
  const SafetensorsFile truth(kGolden / a_case()["weights"].get<std::string>()),
      saved(out_ / "model.safetensors");
  std::set<std::string> expected, found;
  for (const auto& entry : truth.entries()) expected.insert(entry.name);
  for (const auto& entry : saved.entries()) found.insert(entry.name);
  EXPECT_EQ(found, expected);
  for (const std::string& name : expected) {
    if (!saved.contains(name)) continue;
    EXPECT_EQ(saved.tensor(name).scalar_type(), truth.tensor(name).scalar_type()) << name;
    EXPECT_EQ(saved.tensor(name).sizes(), truth.tensor(name).sizes()) << name;
    EXPECT_TRUE(at::equal(saved.tensor(name), truth.tensor(name))) << name;
  }
  EXPECT_EQ(saved.metadata().at("format"), "pt");
}

TEST_P(SavedCase, HasTheReferencesConfig) {
  const Json& truth = a_case()["config"];
  const Json saved = config_to_hf(config_from_hf(truth, "golden"));
  // Written in the older form, and compared below; not known to the model; or what has no effect
  // where no layer has a window.
  const std::set<std::string> others = {
      "rope_theta",   "rope_scaling", "rope_local_base_freq", "original_max_position_embeddings",
      "bos_token_id", "pad_token_id", "partial_rotary_factor"};
  int compared = 0;
  for (const auto& [name, value] : saved.items()) {
    if (others.contains(name) || !truth.contains(name)) continue;
    if (name == "max_window_layers" && !truth["use_sliding_window"].get<bool>()) continue;
    if (name == "max_window_layers" && GetParam() == "qwen3_windows") continue;  // no such prefix
    EXPECT_EQ(value, truth[name]) << name;
    ++compared;
  }
  EXPECT_GE(compared, 12);
  const Config want = config_from_hf(truth, "golden"), got = config_from_hf(saved, "saved");
  EXPECT_EQ(got.blocks, want.blocks);
  EXPECT_EQ(got.context, want.context);
  EXPECT_EQ(got.end_tokens, want.end_tokens);
}

TEST_P(SavedCase, GivesTheSameLogitsWhenItIsOpenedAgain) {
  const int32_t context = a_case()["context"].get<int32_t>();
  const auto model = open_pretrained(source(), {.context = context});
  save_model(*model, out_);
  const auto again = open_pretrained(out_, {.context = context});
  expect_same_parameters(*again, *model);
  EXPECT_TRUE(at::equal(logits_of(*again, golden_tokens()), logits_of(*model, golden_tokens())));
}

INSTANTIATE_TEST_SUITE_P(Pretrained, SavedCase, ::testing::ValuesIn(case_names()),
                         [](const auto& p) { return p.param; });

class SavePretrained : public ::testing::Test {
 protected:
  static std::unique_ptr<Model> open(const std::string& name,
                                     const PretrainedOptions& options = {}) {
    return open_pretrained(write_folder(case_named(name)), options);
  }
  ScratchFolder scratch_;
  const fs::path out_ = scratch_ / "saved";
};

TEST_F(SavePretrained, KeepsEveryBitOfAModelWhoseMatricesAreBf16) {
  for (const char* name : {"llama", "gemma3"}) {
    const auto model = open(name, {.type = at::kBFloat16});
    save_pretrained(*model, out_);
    EXPECT_EQ(json_of(out_ / "config.json")["torch_dtype"], "bfloat16");
    expect_same_parameters(*open_pretrained(out_, {.type = at::kBFloat16}), *model);
  }
}

TEST_F(SavePretrained, WritesManyFilesAboveTheLimit) {
  const auto model = open("gemma3");
  save_pretrained(*model, out_, {.shard_bytes = 20'000});
  EXPECT_FALSE(fs::exists(out_ / "model.safetensors"));
  const Json index = json_of(out_ / "model.safetensors.index.json");
  EXPECT_GT(std::set<std::string>(index["weight_map"].begin(), index["weight_map"].end()).size(),
            2u);
  expect_same_parameters(*open_pretrained(out_), *model);
}

TEST_F(SavePretrained, LeavesScoreLayersOut) {
  const auto model = open("qwen3", {.roles = {.set = roles::RoleSet::kGls}, .seed = 3});
  save_pretrained(*model, out_);
  expect_same_parameters(*open_pretrained(out_), *open("qwen3"));
}

TEST_F(SavePretrained, RoundsToHalfAndRefusesWhatThatCannotHold) {
  const auto model = open("llama");
  save_pretrained(*model, out_, {.type = at::kHalf});
  EXPECT_EQ(json_of(out_ / "config.json")["torch_dtype"], "float16");
  const SafetensorsFile saved(out_ / "model.safetensors");
  for (const auto& entry : saved.entries())
    EXPECT_EQ(saved.tensor(entry.name).scalar_type(), at::kHalf) << entry.name;
  // Numbers of eight bits lose nothing, but for those below half's smallest.
  const auto again = open_pretrained(out_);
  for (size_t i = 0; i < model->parameters().size(); ++i) {
    EXPECT_LE(
        (again->parameters()[i].second - model->parameters()[i].second).abs().max().item<double>(),
        6e-8);
  }
  {
    const c10::NoGradGuard no_grad;
    model->parameters().back().second.fill_(70000);
  }
  const fs::path other = scratch_ / "other";
  EXPECT_THAT(error_of([&] { save_pretrained(*model, other, {.type = at::kHalf}); }),
              HasSubstr("choose bfloat16 or float32"));
  EXPECT_FALSE(fs::exists(other)) << "something was written";
}

TEST_F(SavePretrained, RefusesWhatTheConfigHasNoWayToSay) {
  const auto refusal = [](const std::string& name, const std::function<void(Config&)>& change) {
    Config config = config_from_hf(case_named(name)["config"], name);
    change(config);
    return error_of([&] { config_to_hf(config); });
  };
  EXPECT_EQ(refusal("llama", [](Config&) {}), "");
  EXPECT_THAT(refusal("gpt2", [](Config& c) { c.kv_heads = 2; }), HasSubstr("value heads"));
  EXPECT_THAT(refusal("llama", [](Config& c) { c.blocks.out_bias = true; }), HasSubstr("biases"));
  EXPECT_THAT(refusal("llama",
                      [](Config& c) {
                        c.blocks.windows = {4, 0};
                      }),
              HasSubstr("sliding window"));
  EXPECT_THAT(refusal("mistral", [](Config& c) { c.blocks.windows[1] = 8; }),
              HasSubstr("sliding window"));
  EXPECT_THAT(refusal("qwen2", [](Config& c) { c.blocks.attention_scale = 0.5; }),
              HasSubstr("scale of scores"));
  EXPECT_THAT(refusal("gemma3",
                      [](Config& c) {
                        c.blocks.rope[1].scaling = RopeScaling::kLinear;
                        c.blocks.rope[1].factor = 2;
                      }),
              HasSubstr("rotary embedding"));
  EXPECT_THAT(refusal("llama", [](Config& c) { c.blocks.rope.clear(); }), HasSubstr("rotary"));
  EXPECT_THAT(refusal("llama", [](Config& c) { c.architecture = "gpt"; }),
              HasSubstr("no family of pretrained models"));
}

// A text longer than the model's own changes tables, not the model.
TEST_F(SavePretrained, ForgetsTheContextThatTheModelWasOpenedWith) {
  for (const char* name : {"llama_dynamic_beyond", "phi3_longrope_long"}) {
    const Json& config = case_named(name)["config"];
    save_pretrained(*open(name, {.context = 100}), out_);
    EXPECT_EQ(json_of(out_ / "config.json")["max_position_embeddings"],
              config["max_position_embeddings"])
        << name;
  }
}

// Divisors as GGUF files have them, of Llama 3.1's scaling by 8 and of no published one.
TEST_F(SavePretrained, SaysRotaryDivisorsInFieldsOfTheConfig) {
  Config config = config_from_hf(case_named("llama")["config"], "llama");
  config.head_dim = 64;
  config.context = 131072;
  RopeOptions plain{.base = 500000}, scaled = plain;
  scaled.scaling = RopeScaling::kLlama3;
  scaled.factor = 8;
  scaled.original_context = 8192;
  const auto from = rope_frequencies(plain, 64, 131072).inverse,
             to = rope_frequencies(scaled, 64, 131072).inverse;
  for (size_t c = 0; c < from.size(); ++c) plain.divisors.push_back(from[c] / to[c]);
  config.blocks.rope = {plain};
  Json scaling = config_to_hf(config)["rope_scaling"];
  EXPECT_EQ(scaling["rope_type"], "llama3");
  EXPECT_EQ(scaling["factor"], 8);
  EXPECT_EQ(scaling["original_max_position_embeddings"], 8192);

  config.blocks.rope[0].divisors[20] *= 1.01f;
  scaling = config_to_hf(config)["rope_scaling"];
  EXPECT_EQ(scaling["rope_type"], "longrope");
  EXPECT_EQ(scaling["attention_factor"], 1);
  EXPECT_EQ(scaling["long_factor"].get<std::vector<float>>(), config.blocks.rope[0].divisors);
}

TEST_F(SavePretrained, GivesTheFilesThatAGgufFileWasMadeOf) {
  for (const char* name : {"llama", "llama_head_dim", "qwen3"}) {
    const fs::path source = write_folder(case_named(name));
    const fs::path file = scratch_ / (std::string(name) + ".gguf");
    GgufBuilder gguf;
    gguf.value("tokenizer.ggml.eos_token_id", GgufFile::ValueType::kU32, raw(uint32_t{2}));
    GgufModel(source, gguf);
    std::ofstream(file, std::ios::binary) << gguf.bytes();
    const auto model = open_pretrained(file), truth = open_pretrained(source);
    expect_same_parameters(*model, *truth);  // else the file is wrong
    save_pretrained(*model, out_);
    expect_same_parameters(*open_pretrained(out_), *truth);
    EXPECT_EQ(pretrained_config(out_).blocks, truth->config().blocks) << name;
    EXPECT_EQ(json_of(out_ / "config.json")["eos_token_id"], 2);
  }
}

}  // namespace
}  // namespace natslm::models
