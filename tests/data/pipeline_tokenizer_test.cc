// Every kind of tokenizer.json against what `tokenizers` gives, and SentencePiece's models against
// SentencePiece: hashes recorded by tools/golden_pipelines.py. SPDX-License-Identifier: Apache-2.0
#include "natslm/data/pipeline_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/data/sentencepiece_model.h"
#include "natslm/data/tokenizer_json.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using Ids = std::vector<int32_t>;
using testing::HasSubstr;

std::filesystem::path pipelines() {
  return golden_folder() / "pipelines";
}

Json read_json(const std::filesystem::path& path) {
  return Json::parse(read_file(path));
}

Json vocabulary(const std::string& name) {
  return read_json(name == "bytes" ? golden_folder() / "tokenizer.json"
                                   : pipelines() / (name + ".json"));
}

// "model/fuse_unk" -> value
Json patched(Json json, const Json& patch) {
  for (const auto& [path, value] : patch.items()) json[Json::json_pointer("/" + path)] = value;
  return json;
}

Json kind(const std::string& name) {
  for (const Json& one : read_json(pipelines() / "kinds.json")) {
    if (one["name"] == name) return patched(vocabulary(one["vocabulary"]), one["patch"]);
  }
  ADD_FAILURE() << "no kind " << name;
  return {};
}

std::string hash_of_bytes(const std::string& text) {
  Ids bytes;
  for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return hash_of(bytes);
}

std::string without(std::string text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
  return text;
}

const std::vector<std::pair<std::string, std::string>>& cases() {
  static const auto all = [] {
    std::vector<std::pair<std::string, std::string>> result;
    for (const Json& one : read_json(golden_folder() / "cases.json")) {
      result.emplace_back(one["name"], one["text"]);
    }
    return result;
  }();
  return all;
}

// decodes: false for a tokenizer without a decoder, whose tokens `tokenizers` puts spaces between.
// removed: what the oracle's texts lack.
void expect_golden(const Tokenizer& tokenizer, const Json& golden, const std::string& name,
                   bool decodes = true, const std::string& removed = "") {
  const auto text_of = [&](const std::string& text) {
    return removed.empty() ? text : without(text, removed);
  };
  const auto hashes = [&](const char* what) { return golden[what].get<std::string>(); };
  const std::string of_cases = hashes("cases"), decoded = hashes("decoded");
  ASSERT_EQ(of_cases.size(), 8 * cases().size());
  for (size_t i = 0; i < cases().size(); ++i) {
    const Ids ids = tokenizer.encode(text_of(cases()[i].second));
    EXPECT_EQ(hash_of(ids), of_cases.substr(8 * i, 8))
        << name << ": " << cases()[i].first << ": " << testing::PrintToString(ids);
    if (!decodes) continue;
    EXPECT_EQ(hash_of_bytes(tokenizer.decode(ids)), decoded.substr(8 * i, 8))
        << name << " decoded: " << cases()[i].first << ": " << tokenizer.decode(ids);
  }
  const std::string of_fuzz = hashes("fuzz");
  for (uint64_t i = 0; i < of_fuzz.size() / 8; ++i) {
    Ids ids;
    for (uint64_t n = 10 * i; n < 10 * i + 10; ++n) tokenizer.encode_to(text_of(fuzz_text(n)), ids);
    EXPECT_EQ(hash_of(ids), of_fuzz.substr(8 * i, 8)) << name << ": fuzz from " << 10 * i;
  }
  constexpr uint32_t kBlocks[] = {0,    1,    2,    3,    4,    5,    6,    7,    8,    9,
                                  10,   11,   12,   13,   14,   15,   16,   0x29, 0x2B, 0x35,
                                  0x3E, 0x3F, 0x41, 0x42, 0x43, 0x44, 0x46, 0x75, 0x78, 0x7C};
  const std::string of_blocks = hashes("blocks");
  ASSERT_EQ(of_blocks.size(), 8 * std::size(kBlocks));
  for (size_t i = 0; i < std::size(kBlocks); ++i) {
    EXPECT_EQ(hash_of(tokenizer.encode(block_text(kBlocks[i]))), of_blocks.substr(8 * i, 8))
        << name << ": code points from " << kBlocks[i] * kBlock;
  }
}

TEST(PipelineTokenizer, EachKindGivesTheIdsThatTokenizersGives) {
  const Json kinds = read_json(pipelines() / "kinds.json");
  ASSERT_GT(kinds.size(), 40u);
  for (const Json& one : kinds) {
    const std::string name = one["name"];
    const Json json = patched(vocabulary(one["vocabulary"]), one["patch"]);
    const auto tokenizer = make_tokenizer(json);
    expect_golden(*tokenizer, one, name, !json["decoder"].is_null());
    EXPECT_EQ(tokenizer->before_text(), one["before"].get<Ids>()) << name;
    EXPECT_EQ(tokenizer->after_text(), one["after"].get<Ids>()) << name;
  }
}

TEST(SentencePiece, ModelsGiveTheIdsThatSentencePieceGives) {
  const Json golden = read_json(pipelines() / "sentencepiece.json");
  for (const auto& [name, hashes] : golden.items()) {
    if (!hashes.is_object()) continue;
    const auto tokenizer = load_tokenizer(pipelines() / (name + ".model"));
    // SentencePiece writes an unknown character as a sign of its own.
    const bool decodes = name != "unigram";
    expect_golden(*tokenizer, hashes, name, decodes, std::string(kEndOfText));
  }
}

TEST(PipelineTokenizer, WhatIsSavedIsLoadedUnchanged) {
  for (const std::string name : {"llama 3", "llama 2", "t5", "flags and a normalizer"}) {
    const ScratchFolder folder;
    const auto original = make_tokenizer(kind(name));
    original->save(folder.path());
    const auto loaded = load_tokenizer(folder.path());
    EXPECT_EQ(loaded->fingerprint(), original->fingerprint()) << name;
    EXPECT_EQ(loaded->encode(fuzz_text(3)), original->encode(fuzz_text(3))) << name;
    EXPECT_EQ(loaded->end_of_text(), original->end_of_text()) << name;
  }
  EXPECT_NE(make_tokenizer(kind("llama 2"))->fingerprint(),
            make_tokenizer(kind("mistral"))->fingerprint());
}

TEST(PipelineTokenizer, ThreadsMayShareOne) {
  const auto tokenizer = make_tokenizer(kind("llama 2"));
  std::vector<Ids> alone(6), together(6);
  for (uint64_t i = 0; i < 6; ++i) alone[i] = tokenizer->encode(fuzz_text(i));
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] { together[i] = tokenizer->encode(fuzz_text(i)); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(alone, together);
}

TEST(PipelineTokenizer, ByteFallbackGivesAnyBytesBack) {
  const auto tokenizer = make_tokenizer(kind("mistral"));
  for (uint64_t number = 0; number < 200; ++number) {
    // A space at the beginning would be taken for the prefix.
    const std::string text = "x" + damaged_text(number);
    ASSERT_EQ(tokenizer->decode(tokenizer->encode(text)), text) << number;
  }
}

TEST(PipelineTokenizer, LongTextWithoutAPlaceToCutIsQuick) {
  for (const std::string name : {"llama 2", "unigram, whole text"}) {
    const auto tokenizer = make_tokenizer(kind(name));
    std::string text;
    while (text.size() < (size_t{1} << 20)) text += "lifetime";
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text) << name;
  }
}

TEST(PipelineTokenizer, DamagedBytesNeverCrash) {
  for (const Json& one : read_json(pipelines() / "kinds.json")) {
    const auto tokenizer = make_tokenizer(patched(vocabulary(one["vocabulary"]), one["patch"]));
    for (uint64_t number = 0; number < 20; ++number) tokenizer->encode(damaged_text(number));
  }
}

TEST(PipelineTokenizer, MembersThatMatterAndAreNotUnderstoodAreNamed) {
  const ScratchFolder folder;
  const auto refused = [&](const char* name, const char* pointer, const char* value,
                           const std::string& part) {
    Json json = kind(name);
    json[Json::json_pointer(pointer)] = Json::parse(value);
    write_file(folder / "tokenizer.json", json.dump());
    const std::string error = error_of([&] { load_tokenizer(folder.path()); });
    EXPECT_THAT(error, HasSubstr(part)) << pointer;
    EXPECT_THAT(error, HasSubstr("tokenizer.json")) << pointer;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  };
  refused("llama 2", "/normalizer", R"({"type": "Novel"})", "normalizer.type = \"Novel\"");
  refused("llama 2", "/normalizer/normalizers/0/novel", "1", "normalizer.normalizers[0].novel");
  refused("llama 2", "/normalizer/normalizers/1/pattern", R"({"Regex": "("})", "refused by PCRE2");
  refused("llama 2", "/pre_tokenizer", R"({"type": "UnicodeScripts"})", "pre_tokenizer.type");
  refused("llama 2", "/pre_tokenizer",
          R"({"type": "Split", "pattern": {"String": "a"}, "behavior": "Odd", "invert": false})",
          "pre_tokenizer.behavior");
  refused("llama 2", "/post_processor/single", "[]", "post_processor.single");
  refused("llama 2", "/post_processor/special_tokens/<s>/ids/0", "999999",
          "post_processor.special_tokens");
  refused("llama 2", "/decoder/decoders/0/type", R"("CTC")", "decoder.decoders[0].type");
  refused("llama 2", "/model/type", R"("WordPiece")", "model.type");
  refused("llama 2", "/model/dropout", "0.1", "model.dropout");
  refused("llama 2", "/model/unk_token", R"("nowhere")", "model.unk_token");
  refused("llama 2", "/model/merges/0", R"("a")", "model.merges[0]");
  refused("llama 3", "/model/dropout", "0.1", "model.dropout");
  refused("unigram", "/model/unk_id", "99999", "model.unk_id");
  refused("unigram", "/model/vocab/3/1", R"("x")", "model.vocab[3][1]");
  refused("unigram", "/model/vocab/3", "[]", "model.vocab[3]");
  refused("unigram", "/normalizer", R"({"type": "Precompiled", "precompiled_charsmap": "!"})",
          "base64");
  refused("unigram", "/normalizer", R"({"type": "Precompiled", "precompiled_charsmap": "AAAA"})",
          "table of replacements");
}

TEST(PipelineTokenizer, TextThatAUnigramVocabularyCannotExpressIsAnError) {
  Json json = kind("unigram");
  json["model"]["unk_id"] = nullptr;
  const auto tokenizer = make_tokenizer(json);
  EXPECT_THAT(error_of([&] { tokenizer->encode("\u4E01"); }), HasSubstr("no token"));
}

TEST(SentencePiece, ATruncatedOrDamagedModelNeverCrashes) {
  const std::string whole = read_file(pipelines() / "unigram-rules.model");
  const auto tried = [](const std::string& bytes) {
    return error_of([&] { make_tokenizer(tokenizer_json_of(parse_sentencepiece_model(bytes))); });
  };
  EXPECT_EQ(tried(whole), "");
  for (size_t size = 0; size < whole.size(); size += 7) {
    const std::string error = tried(whole.substr(0, size));
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
  for (size_t at = 0; at < whole.size(); at += 5) {
    std::string damaged = whole;
    damaged[at] ^= static_cast<char>(1 << at % 8);
    try {
      make_tokenizer(tokenizer_json_of(parse_sentencepiece_model(damaged)))->encode("Ab e\u0301");
    } catch (const Error&) {
    } catch (const Json::exception&) {  // text that is not UTF-8; load_tokenizer() says so
    }
  }
}

}  // namespace
}  // namespace natslm::data
