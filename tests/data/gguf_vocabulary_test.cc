// Vocabularies of GGUF files: the same ids as the files they were converted from.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/gguf_vocabulary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/data/chat_template.h"
#include "natslm/data/sentencepiece_model.h"
#include "natslm/data/tokenizer_json.h"
#include "tests/data/tokenizer_texts.h"
#include "tests/support/gguf_builder.h"

namespace natslm::data {
namespace {

using Type = GgufFile::ValueType;
using testing::HasSubstr;

std::string strings(const std::vector<std::string>& texts) {
  std::string bytes;
  for (const std::string& text : texts) bytes += raw(text);
  return bytes;
}

template <class T>
std::string numbers(const std::vector<T>& values) {
  std::string bytes;
  for (const T value : values) bytes += raw(value);
  return bytes;
}

// The golden byte-level vocabulary; the last token is <|endoftext|>.
GgufBuilder byte_level_file(const std::string& pre) {
  const Json json = parse_json(read_file(golden_folder() / "tokenizer.json"));
  std::vector<std::string> tokens(1024), merges;
  for (const auto& [name, id] : json["model"]["vocab"].items()) tokens[id.get<size_t>()] = name;
  for (const Json& token : json["added_tokens"])
    tokens[token["id"].get<size_t>()] = token["content"];
  for (const Json& merge : json["model"]["merges"]) {
    merges.push_back(merge.is_string()
                         ? merge.get<std::string>()
                         : merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  std::vector<int32_t> types(tokens.size(), 1);
  types[1023] = 3;
  GgufBuilder file;
  file.value("tokenizer.ggml.model", Type::kString, raw("gpt2"))
      .value("tokenizer.ggml.pre", Type::kString, raw(pre))
      .array("tokenizer.ggml.tokens", Type::kString, tokens.size(), strings(tokens))
      .array("tokenizer.ggml.merges", Type::kString, merges.size(), strings(merges))
      .array("tokenizer.ggml.token_type", Type::kI32, types.size(), numbers(types))
      .value("tokenizer.ggml.bos_token_id", Type::kU32, raw(uint32_t{1023}))
      .value("tokenizer.ggml.eos_token_id", Type::kU32, raw(uint32_t{1023}));
  return file;
}

GgufBuilder sentencepiece_file(const std::string& name) {
  const SentencePieceModel model =
      read_sentencepiece_model(golden_folder() / "pipelines" / (name + ".model"));
  std::vector<std::string> tokens;
  std::vector<float> scores;
  std::vector<int32_t> types;
  for (const auto& piece : model.pieces) {
    tokens.push_back(piece.text);
    scores.push_back(piece.score);
    types.push_back(static_cast<int32_t>(piece.type));
  }
  const auto flag = [](bool value) { return std::string(1, value ? '\1' : '\0'); };
  GgufBuilder file;
  file.value("tokenizer.ggml.model", Type::kString, raw(model.unigram ? "t5" : "llama"))
      .array("tokenizer.ggml.tokens", Type::kString, tokens.size(), strings(tokens))
      .array("tokenizer.ggml.scores", Type::kF32, scores.size(), numbers(scores))
      .array("tokenizer.ggml.token_type", Type::kI32, types.size(), numbers(types))
      .value("tokenizer.ggml.bos_token_id", Type::kU32, raw(static_cast<uint32_t>(model.bos)))
      .value("tokenizer.ggml.add_bos_token", Type::kBool, flag(true))
      .value("tokenizer.ggml.add_eos_token", Type::kBool, flag(false))
      .value("tokenizer.ggml.add_space_prefix", Type::kBool, flag(model.add_dummy_prefix))
      .value("tokenizer.ggml.remove_extra_whitespaces", Type::kBool,
             flag(model.remove_extra_whitespaces));
  return file;
}

std::unique_ptr<Tokenizer> loaded(const ScratchFolder& folder, const GgufBuilder& file) {
  write_file(folder / "model.gguf", file.bytes());
  return load_tokenizer(folder / "model.gguf");
}

void expect_same_ids(const Tokenizer& a, const Tokenizer& b, const std::string& name) {
  for (uint64_t number = 0; number < 60; ++number) {
    ASSERT_EQ(a.encode(fuzz_text(number)), b.encode(fuzz_text(number))) << name << number;
  }
  EXPECT_EQ(a.before_text(), b.before_text()) << name;
}

TEST(GgufVocabulary, ByteLevelOnesEqualTheTokenizerTheyCameFrom) {
  const ScratchFolder folder;
  BpeModel model = read_tokenizer_json(golden_folder() / "tokenizer.json");
  expect_same_ids(*loaded(folder, byte_level_file("gpt-2")), ByteLevelBpe(model), "gpt-2 ");
  model.split.digits = true;
  expect_same_ids(*loaded(folder, byte_level_file("smollm")), ByteLevelBpe(model), "smollm ");
  for (const Json& kind : parse_json(read_file(golden_folder() / "pipelines" / "kinds.json"))) {
    const std::string name = kind["name"];
    if (name != "llama 3" && name != "qwen 2") continue;
    Json json = parse_json(read_file(golden_folder() / "tokenizer.json"));
    for (const auto& [path, value] : kind["patch"].items()) {
      json[Json::json_pointer("/" + path)] = value;
    }
    const auto file = byte_level_file(name == "qwen 2" ? "qwen2" : "llama-bpe");
    expect_same_ids(*loaded(folder, file), *make_tokenizer(json), name);
  }
}

TEST(GgufVocabulary, SentencePieceOnesEqualTheModelTheyCameFrom) {
  const ScratchFolder folder;
  for (const std::string name : {"llama", "gemma", "unigram", "unigram-bytes"}) {
    expect_same_ids(*loaded(folder, sentencepiece_file(name)),
                    *load_tokenizer(golden_folder() / "pipelines" / (name + ".model")), name);
  }
}

TEST(GgufVocabulary, WhatIsMissingOrWrongIsNamed) {
  const ScratchFolder folder;
  const auto refused = [&](const GgufBuilder& file) {
    const std::string error = error_of([&] { loaded(folder, file); });
    EXPECT_THAT(error, HasSubstr("model.gguf"));
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
    return error;
  };
  EXPECT_THAT(refused(byte_level_file("novel")), HasSubstr("tokenizer.ggml.pre = \"novel\""));
  EXPECT_THAT(refused(GgufBuilder()), HasSubstr("tokenizer.ggml.tokens"));
  GgufBuilder other;
  other.value("tokenizer.ggml.model", Type::kString, raw("bert"))
      .array("tokenizer.ggml.tokens", Type::kString, 1, raw("a"));
  EXPECT_THAT(refused(other), HasSubstr("tokenizer.ggml.model = \"bert\""));
  GgufBuilder scores;
  scores.value("tokenizer.ggml.model", Type::kString, raw("llama"))
      .array("tokenizer.ggml.tokens", Type::kString, 1, raw("a"))
      .array("tokenizer.ggml.scores", Type::kF32, 0, "");
  EXPECT_THAT(refused(scores), HasSubstr("tokenizer.ggml.scores has 0 entries"));
  GgufBuilder types;
  types.value("tokenizer.ggml.model", Type::kString, raw("llama"))
      .array("tokenizer.ggml.tokens", Type::kString, 1, raw("a"))
      .array("tokenizer.ggml.token_type", Type::kI32, 1, raw(int32_t{9}));
  EXPECT_THAT(refused(types), HasSubstr("tokenizer.ggml.token_type[0] = 9"));
}

TEST(GgufVocabulary, TheChatTemplateIsInTheFile) {
  const ScratchFolder folder;
  GgufBuilder file = byte_level_file("gpt-2");
  file.value("tokenizer.chat_template", Type::kString,
             raw("{{ messages[0].content }}{{ eos_token }}"));
  write_file(folder / "model.gguf", file.bytes());
  const ChatMessage messages[] = {{"user", "hi"}};
  EXPECT_EQ(load_chat_template(folder / "model.gguf")->render(messages), "hi<|endoftext|>");
  EXPECT_FALSE(load_chat_template(folder / "model.gguf", "tool_use"));
}

}  // namespace
}  // namespace natslm::data
