// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/gguf_vocabulary.h"

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/data/sentencepiece_model.h"
#include "natslm/data/split_rule.h"

namespace natslm::data {
namespace {

using Type = SentencePieceModel::Type;

// What a name in tokenizer.ggml.pre stands for: how the tokenizer.json that it was converted from
// cuts text. An empty pattern is GPT-2's.
struct Split {
  std::string_view name;
  std::string_view pattern;
  bool digits = false, nfc = false, ignore_merges = false, add_bos = false;
};

constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekkenPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr Split kSplits[] = {
    {.name = "gpt-2", .pattern = ""},
    {.name = "phi-2", .pattern = ""},
    {.name = "smollm", .pattern = "", .digits = true},
    {.name = "starcoder", .pattern = "", .digits = true},
    {.name = "llama-bpe", .pattern = kLlama3Pattern, .ignore_merges = true, .add_bos = true},
    {.name = "qwen2", .pattern = kQwen2Pattern, .nfc = true},
    {.name = "tekken", .pattern = kTekkenPattern, .ignore_merges = true, .add_bos = true},
};

std::string key(std::string_view name) {
  return "tokenizer.ggml." + std::string(name);
}

const Split& split_of(const GgufFile& file) {
  const std::string_view name = file.get_string(key("pre"));
  const auto found = std::ranges::find(kSplits, name, &Split::name);
  if (found == std::end(kSplits)) {
    std::vector<std::string_view> known;
    for (const Split& split : kSplits) known.push_back(split.name);
    fail("tokenizer.ggml.pre = \"", name, "\" is not supported (only ", list(known), ")");
  }
  return *found;
}

std::vector<Type> types_of(const GgufFile& file, size_t size) {
  std::vector<Type> types(size, Type::kNormal);
  if (!file.contains(key("token_type"))) return types;
  const std::vector<int32_t> numbers = file.get_i32s(key("token_type"));
  NATSLM_CHECK(numbers.size() == size, "tokenizer.ggml.token_type has ", numbers.size(),
               " entries, tokenizer.ggml.tokens has ", size);
  for (size_t id = 0; id < size; ++id) {
    // 0: not told.
    NATSLM_CHECK(numbers[id] >= 0 && numbers[id] <= 6, "tokenizer.ggml.token_type[", id,
                 "] = ", numbers[id], " is not known");
    if (numbers[id] > 0) types[id] = static_cast<Type>(numbers[id]);
  }
  return types;
}

// -1: the file names none.
int32_t special_id(const GgufFile& file, std::string_view name, size_t size) {
  if (!file.contains(key(name))) return -1;
  const uint32_t id = file.get_u32(key(name));
  NATSLM_CHECK(id < size, key(name), " = ", id, ", but there are ", size, " tokens");
  return static_cast<int32_t>(id);
}

Json byte_level_json(const GgufFile& file, const std::vector<std::string_view>& tokens) {
  const Split& split = split_of(file);
  const std::vector<Type> types = types_of(file, tokens.size());
  Json vocabulary = Json::object(), added = Json::array(), merges = Json::array();
  for (size_t id = 0; id < tokens.size(); ++id) {
    const bool special = types[id] == Type::kControl || types[id] == Type::kUnknown;
    const bool fresh = vocabulary.emplace(tokens[id], id).second;
    NATSLM_CHECK(fresh, "tokenizer.ggml.tokens[", id, "] = \"", tokens[id],
                 "\" stands there twice");
    if (!special && types[id] != Type::kUserDefined) continue;
    added.push_back({{"id", id},
                     {"content", tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", special}});
  }
  for (const std::string_view merge : file.get_strings(key("merges"))) merges.push_back(merge);

  Json steps = Json::array();
  const bool own_pattern = !split.pattern.empty();
  if (split.digits) steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
  if (own_pattern) {
    steps.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", split.pattern}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
  }
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", !own_pattern}};
  steps.push_back(byte_level);

  Json single = Json::array(), specials = Json::object();
  const auto special = [&](int32_t id) {
    if (id < 0) return;
    single.push_back({{"SpecialToken", {{"id", tokens[id]}, {"type_id", 0}}}});
    specials[std::string(tokens[id])] = {
        {"id", tokens[id]}, {"ids", Json::array({id})}, {"tokens", Json::array({tokens[id]})}};
  };
  if (file.get_bool(key("add_bos_token"), split.add_bos)) {
    special(special_id(file, "bos_token_id", tokens.size()));
  }
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  if (file.get_bool(key("add_eos_token"), false)) {
    special(special_id(file, "eos_token_id", tokens.size()));
  }
  Json post_processor;
  if (single.size() > 1) {
    post_processor = {{"type", "TemplateProcessing"},
                      {"single", single},
                      {"pair", single},
                      {"special_tokens", specials}};
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", std::move(added)},
          {"normalizer", split.nfc ? Json{{"type", "NFC"}} : Json()},
          {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}}},
          {"post_processor", std::move(post_processor)},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", split.ignore_merges},
            {"vocab", std::move(vocabulary)},
            {"merges", std::move(merges)}}}};
}

Json sentencepiece_json(const GgufFile& file, const std::vector<std::string_view>& tokens,
                        bool unigram) {
  const std::vector<Type> types = types_of(file, tokens.size());
  const std::vector<float> scores = file.get_f32s(key("scores"));
  NATSLM_CHECK(scores.size() == tokens.size(), "tokenizer.ggml.scores has ", scores.size(),
               " entries, tokenizer.ggml.tokens has ", tokens.size());
  SentencePieceModel model;
  model.unigram = unigram;
  for (size_t id = 0; id < tokens.size(); ++id) {
    model.pieces.push_back({std::string(tokens[id]), scores[id], types[id]});
    model.byte_fallback |= types[id] == Type::kByte;
  }
  model.add_dummy_prefix = file.get_bool(key("add_space_prefix"), true);
  model.remove_extra_whitespaces = file.get_bool(key("remove_extra_whitespaces"), unigram);
  model.bos = special_id(file, "bos_token_id", tokens.size());
  model.eos = special_id(file, "eos_token_id", tokens.size());
  model.add_bos = file.get_bool(key("add_bos_token"), !unigram);
  model.add_eos = file.get_bool(key("add_eos_token"), unigram);
  if (file.contains(key("precompiled_charsmap"))) {
    const GgufFile::Value& map = *file.find(key("precompiled_charsmap"));
    NATSLM_CHECK(map.is_array() && (map.element == GgufFile::ValueType::kU8 ||
                                    map.element == GgufFile::ValueType::kI8),
                 "tokenizer.ggml.precompiled_charsmap must be an array of bytes");
    model.charsmap.assign(reinterpret_cast<const char*>(map.bytes.data()), map.bytes.size());
  }
  return tokenizer_json_of(model);
}

}  // namespace

Json tokenizer_json_of(const GgufFile& file) {
  const std::vector<std::string_view> tokens = file.get_strings(key("tokens"));
  NATSLM_CHECK(!tokens.empty() && tokens.size() <= kMostTokens, "tokenizer.ggml.tokens has ",
               tokens.size(), " tokens");
  const std::string_view model = file.get_string(key("model"));
  if (model == "gpt2") return byte_level_json(file, tokens);
  NATSLM_CHECK(model == "llama" || model == "t5", "tokenizer.ggml.model = \"", model,
               "\" is not supported (only gpt2, llama, t5)");
  return sentencepiece_json(file, tokens, model == "t5");
}

}  // namespace natslm::data
