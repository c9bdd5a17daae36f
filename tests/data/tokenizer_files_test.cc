// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/atomic_file.h"
#include "natslm/data/byte_level_bpe.h"
#include "natslm/data/tokenizer_json.h"
#include "natslm/data/train_bpe.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using Json = nlohmann::json;

// Few bytes have a token, so that its files are short enough to be damaged at every byte.
BpeModel small_model() {
  BpeModel model;
  for (const char byte : std::string_view("aceht \"\n")) model.tokens.emplace_back(1, byte);
  model.tokens.insert(model.tokens.end(), {"th", "the", " c", std::string(kEndOfText)});
  model.merges = {{4, 3}, {8, 2}, {5, 1}};
  model.added.push_back({11, std::string(kEndOfText), true, false});
  return model;
}

std::string small_json() {
  const ScratchFolder folder;
  ByteLevelBpe(small_model()).save(folder.path());
  return read_file(folder / "tokenizer.json");
}

// Loading must work or throw an Error of one line that names the file.
void expect_loaded_or_refused(const std::filesystem::path& path,
                              const std::filesystem::path& damaged, const std::string& what) {
  const std::string error = error_of([&] { load_tokenizer(path); });
  if (error.empty()) return;
  EXPECT_NE(error.find(damaged.filename().string()), std::string::npos) << what << ": " << error;
  EXPECT_EQ(error.find('\n'), std::string::npos) << what << ": " << error;
}

TEST(TokenizerFiles, WhatIsSavedIsLoadedUnchanged) {
  for (const SplitRule& split :
       {SplitRule{}, SplitRule{.digits = true}, SplitRule{true, R"(\p{N}{1,3}|\p{L}+|\s+)"}}) {
    BpeModel model = read_tokenizer_json(golden_folder() / "tokenizer.json");
    model.split = split;
    model.added.push_back(
        {static_cast<int32_t>(model.tokens.size()), "<a \"quoted\" é>", false, true});
    model.tokens.emplace_back("<a \"quoted\" é>");
    const ByteLevelBpe original(model);
    const ScratchFolder folder;
    original.save(folder.path());
    const auto loaded = load_tokenizer(folder.path());
    EXPECT_EQ(loaded->fingerprint(), original.fingerprint());
    EXPECT_EQ(loaded->vocabulary(), original.vocabulary());
    EXPECT_EQ(loaded->end_of_text(), original.end_of_text());
    EXPECT_EQ(loaded->encode(fuzz_text(1)), original.encode(fuzz_text(1)));
  }
}

TEST(TokenizerFiles, Gpt2sPairOfFilesUnderBothNamesEqualsTokenizerJson) {
  const ScratchFolder folder;
  const BpeModel model = read_tokenizer_json(golden_folder() / "tokenizer.json");
  Json vocabulary = Json::object();
  for (size_t id = 0; id < model.tokens.size(); ++id)
    vocabulary[byte_level_text(model.tokens[id])] = id;
  std::string merges = "#version: 0.2\n";
  for (const auto& [left, right] : model.merges) {
    merges +=
        byte_level_text(model.tokens[left]) + " " + byte_level_text(model.tokens[right]) + "\n";
  }
  write_file(folder / "a/encoder.json", vocabulary.dump());
  write_file(folder / "a/vocab.bpe", merges);
  write_file(folder / "b/vocab.json", vocabulary.dump());
  write_file(folder / "b/merges.txt", merges);
  for (const std::string name : {"a", "b"}) {
    const auto loaded = load_tokenizer(folder / name);
    EXPECT_EQ(loaded->fingerprint(), ByteLevelBpe(model).fingerprint());
    EXPECT_EQ(loaded->end_of_text(), 1023);
  }
  std::filesystem::remove(folder / "b/merges.txt");
  EXPECT_NE(error_of([&] { load_tokenizer(folder / "b"); }).find("vocab.json but no merges.txt"),
            std::string::npos);
  // Cut at the end of a line: each line is fine, but the vocabulary is not made any more.
  write_file(folder / "a/vocab.bpe", merges.substr(0, merges.rfind('\n', merges.size() / 2) + 1));
  EXPECT_NE(error_of([&] { load_tokenizer(folder / "a"); }).find("truncated"), std::string::npos);
}

TEST(TokenizerFiles, SmolLm2sFilesLoad) {
  const auto folder = shared_data() / "tokenizers" / "smollm2";
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "EXTRA NOT RUN: needs SmolLM2's files in " << folder;
  const auto loaded = load_tokenizer(folder);
  EXPECT_EQ(loaded->vocabulary(), 49152);
  EXPECT_EQ(loaded->end_of_text(), 0);
  EXPECT_EQ(loaded->token_bytes(1), "<|im_start|>");
}

TEST(TokenizerFiles, MergesMayBeListsOrStrings) {
  const ScratchFolder folder;
  Json json = Json::parse(small_json());
  for (Json& merge : json["model"]["merges"]) {
    const auto line = merge.get<std::string>();
    merge = Json::array({line.substr(0, line.find(' ')), line.substr(line.find(' ') + 1)});
  }
  write_file(folder / "lists.json", json.dump());
  write_file(folder / "strings.json", small_json());
  EXPECT_EQ(load_tokenizer(folder / "lists.json")->fingerprint(),
            load_tokenizer(folder / "strings.json")->fingerprint());
}

TEST(TokenizerFiles, DigitsBeforeByteLevelAreUnderstood) {
  Json json = Json::parse(small_json());
  json["pre_tokenizer"] = Json::parse(R"({"type": "Sequence", "pretokenizers": [
      {"type": "Digits", "individual_digits": true},
      {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]})");
  const ScratchFolder folder;
  write_file(folder / "tokenizer.json", json.dump());
  EXPECT_TRUE(read_tokenizer_json(folder / "tokenizer.json").split.digits);
}

TEST(TokenizerFiles, MembersThatMatterAndAreNotUnderstoodAreNamed) {
  const ScratchFolder folder;
  const auto refused = [&](const char* pointer, const char* value, const std::string& name) {
    Json json = Json::parse(small_json());
    json[Json::json_pointer(pointer)] = Json::parse(value);
    write_file(folder / "tokenizer.json", json.dump());
    const std::string error = error_of([&] { load_tokenizer(folder.path()); });
    EXPECT_NE(error.find("member " + name), std::string::npos) << error;
    EXPECT_NE(error.find("tokenizer.json"), std::string::npos) << error;
  };
  refused("/normalizer", R"({"type": "NFX"})", "normalizer.type");
  refused("/pre_tokenizer/type", R"("Novel")", "pre_tokenizer.type");
  refused("/pre_tokenizer/add_prefix_space", "1", "pre_tokenizer.add_prefix_space");
  refused("/post_processor", R"({"type": "Novel"})", "post_processor.type");
  refused("/decoder/type", R"("WordPiece")", "decoder.type");
  refused("/model/type", R"("WordPiece")", "model.type");
  refused("/model/dropout", "0.1", "model.dropout");
  refused("/model/continuing_subword_prefix", R"("##")", "model.continuing_subword_prefix");
  refused("/model/end_of_word_suffix", R"("</w>")", "model.end_of_word_suffix");
  refused("/model/novelty", "1", "model.novelty");
  refused("/added_tokens/0/lstrip", "1", "added_tokens[0].lstrip");
  refused("/added_tokens/0/id", "-1", "added_tokens[0].id");
  refused("/model/vocab/th", "3000000000", "model.vocab[\"th\"]");
  refused("/model/vocab/th", "1", "model.vocab[");
  refused("/novelty", "1", ".novelty");
}

TEST(TokenizerFiles, ATruncatedTokenizerJsonIsRefusedWhereverItEnds) {
  const ScratchFolder folder;
  const std::string whole = small_json();
  const auto path = folder / "tokenizer.json";
  for (size_t size = 0; size + 2 < whole.size(); ++size) {
    write_file(path, whole.substr(0, size));
    const std::string error = error_of([&] { load_tokenizer(path); });
    ASSERT_NE(error.find("tokenizer.json"), std::string::npos) << "size " << size << ": " << error;
    ASSERT_EQ(error.find('\n'), std::string::npos) << error;
  }
}

TEST(TokenizerFiles, AFlippedBitNeverCrashes) {
  const ScratchFolder folder;
  const std::string whole = small_json();
  const auto path = folder / "tokenizer.json";
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string damaged = whole;
    damaged[at] ^= static_cast<char>(1 << at % 8);
    write_file(path, damaged);
    expect_loaded_or_refused(path, path, "bit of byte " + std::to_string(at));
  }
}

TEST(TokenizerFiles, DamagedPairsOfFilesNeverCrash) {
  const ScratchFolder folder;
  const BpeModel model = small_model();
  Json vocabulary = Json::object();
  for (size_t id = 0; id < model.tokens.size(); ++id)
    vocabulary[byte_level_text(model.tokens[id])] = id;
  std::string merges;
  for (const auto& [left, right] : model.merges) {
    merges +=
        byte_level_text(model.tokens[left]) + " " + byte_level_text(model.tokens[right]) + "\n";
  }
  const std::string files[] = {vocabulary.dump(), merges};
  const std::filesystem::path paths[] = {folder / "vocab.json", folder / "merges.txt"};
  for (const int which : {0, 1}) {
    write_file(paths[1 - which], files[1 - which]);
    for (size_t at = 0; at < files[which].size(); ++at) {
      write_file(paths[which], files[which].substr(0, at));
      // Less of one file may show as a fault of the other.
      const std::string error = error_of([&] { load_tokenizer(folder.path()); });
      EXPECT_TRUE(at + 1 == files[which].size() || !error.empty()) << "size " << at;
      EXPECT_EQ(error.find('\n'), std::string::npos) << error;
      std::string damaged = files[which];
      damaged[at] ^= static_cast<char>(1 << at % 8);
      write_file(paths[which], damaged);
      expect_loaded_or_refused(folder.path(), folder.path(), "bit of byte " + std::to_string(at));
    }
  }
}

TEST(TokenizerFiles, AMemberGivenTwiceIsRefused) {
  const ScratchFolder folder;
  std::string json = small_json();
  json.insert(json.find("\"th\""), "\"th\": 7, ");
  write_file(folder / "tokenizer.json", json);
  EXPECT_NE(error_of([&] { load_tokenizer(folder.path()); }).find("\"th\" is given twice"),
            std::string::npos);
}

TEST(TokenizerFiles, MissingOnesAreNamed) {
  const ScratchFolder folder;
  EXPECT_NE(error_of([&] { load_tokenizer(folder / "nowhere"); }).find("no such file"),
            std::string::npos);
  EXPECT_NE(error_of([&] { load_tokenizer(folder.path()); }).find("it needs tokenizer.json"),
            std::string::npos);
}

TEST(TokenizerFiles, ByteLevelTextIsTheAlphabetOfGpt2) {
  EXPECT_EQ(byte_level_text(" \n\x7F!a\xC3"), "ĠĊġ!aÃ");
  EXPECT_EQ(byte_level_alphabet().substr(0, 3), "!\"#");
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  EXPECT_EQ(byte_level_bytes(byte_level_text(all)), all);
  for (const std::string text : {" ", "\n", "Ń\xC5\x84", "中", "\xFF", "\xC2\x80"}) {
    EXPECT_NE(error_of([&] { byte_level_bytes(text); }), "") << text;
  }
}

}  // namespace
}  // namespace natslm::data
