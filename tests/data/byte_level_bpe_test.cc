// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/byte_level_bpe.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/data/tokenizer_json.h"
#include "natslm/data/train_bpe.h"
#include "tests/data/golden_hashes.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using Ids = std::vector<int32_t>;
using Json = nlohmann::json;

BpeModel golden_model(bool digits) {
  BpeModel model = read_tokenizer_json(golden_folder() / "tokenizer.json");
  model.split.digits = digits;
  return model;
}

// Bytes, then the merges given as strings.
BpeModel model_of(const std::vector<std::pair<std::string, std::string>>& merges) {
  BpeModel model;
  for (const char byte : byte_level_alphabet()) model.tokens.emplace_back(1, byte);
  const auto id = [&](const std::string& token) {
    const auto found = std::find(model.tokens.begin(), model.tokens.end(), token);
    if (found != model.tokens.end()) return static_cast<int32_t>(found - model.tokens.begin());
    model.tokens.push_back(token);
    return static_cast<int32_t>(model.tokens.size() - 1);
  };
  for (const auto& [left, right] : merges) {
    const std::pair<int32_t, int32_t> merge{id(left), id(right)};
    id(left + right);
    model.merges.push_back(merge);
  }
  return model;
}

// The definition: while any pair can be merged, merge the leftmost one of the lowest rank.
Ids by_definition(const BpeModel& model, const std::string& piece) {
  Ids ids;
  for (const char byte : piece) {
    for (int32_t id = 0; id < 256; ++id) {
      if (model.tokens[id] == std::string(1, byte)) ids.push_back(id);
    }
  }
  for (;;) {
    size_t best = model.merges.size(), place = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best; ++rank) {
        if (model.merges[rank] == std::pair(ids[i], ids[i + 1])) {
          best = rank;
          place = i;
        }
      }
    }
    if (best == model.merges.size()) return ids;
    const std::string joined = model.tokens[ids[place]] + model.tokens[ids[place + 1]];
    ids[place] = static_cast<int32_t>(std::find(model.tokens.begin(), model.tokens.end(), joined) -
                                      model.tokens.begin());
    ids.erase(ids.begin() + place + 1);
  }
}

TEST(ByteLevelBpe, GivesTheIdsThatTokenizersGivesForTheRecordedTexts) {
  const ByteLevelBpe plain(golden_model(false)), digits(golden_model(true));
  const Json cases = Json::parse(read_file(golden_folder() / "cases.json"));
  ASSERT_GT(cases.size(), 80u);
  for (const Json& one : cases) {
    const auto text = one["text"].get<std::string>();
    EXPECT_EQ(plain.encode(text), one["ids"].get<Ids>()) << one["name"];
    EXPECT_EQ(digits.encode(text), one.value("digits", one["ids"]).get<Ids>()) << one["name"];
    EXPECT_EQ(plain.decode(one["ids"].get<Ids>()), text) << one["name"];
  }
}

TEST(ByteLevelBpe, GivesTheIdsThatTokenizersGivesForEachCodePointAndRandomTexts) {
  // The planes that have characters; data_exhaustive_test takes all.
  expect_golden_hashes(golden_model(false), golden_folder() / "hashes.json", 0x40000 / kBlock);
}

TEST(ByteLevelBpe, KnownFactsAboutGpt2) {
  const auto folder = shared_data() / "tokenizers" / "gpt2";
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "EXTRA NOT RUN: needs GPT-2's files in " << folder;
  const auto tokenizer = load_tokenizer(folder);
  EXPECT_EQ(tokenizer->vocabulary(), 50257);
  EXPECT_EQ(tokenizer->end_of_text(), 50256);
  EXPECT_EQ(tokenizer->encode("Hello world"), (Ids{15496, 995}));
  EXPECT_EQ(tokenizer->encode("a<|endoftext|>b"), (Ids{64, 50256, 65}));
  EXPECT_EQ(tokenizer->token_bytes(220), " ");
  EXPECT_EQ(tokenizer->token_bytes(198), "\n");
}

TEST(ByteLevelBpe, AnyBytesComeBack) {
  const ByteLevelBpe tokenizer(golden_model(false));
  for (uint64_t number = 0; number < 500; ++number) {
    Random random(number);
    std::string bytes(random.below(400), '\0');
    for (char& byte : bytes) byte = static_cast<char>(random.below(256));
    for (const std::string& text : {bytes, damaged_text(number)}) {
      ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << "number " << number;
    }
  }
}

TEST(ByteLevelBpe, LoneSurrogatesAndCutCharactersComeBack) {
  const ByteLevelBpe tokenizer(golden_model(false));
  for (const std::string text :
       {"\xED\xA0\x80", "a\xED\xB0\x80z", "\xE2\x82", " \xF0\x9F\x98 ", "\xC0\xAF", "\xFF"}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << testing::PrintToString(text);
  }
}

TEST(ByteLevelBpe, MergesShortAndLongPiecesByTheDefinition) {
  const BpeModel model = model_of({{"a", "b"},
                                   {"b", "a"},
                                   {"a", "a"},
                                   {"ab", "a"},
                                   {"aa", "aa"},
                                   {"b", "b"},
                                   {"ba", "ba"},
                                   {"aba", "bb"},
                                   {"aaaa", "b"}});
  const ByteLevelBpe tokenizer(model);
  for (uint64_t number = 0; number < 300; ++number) {
    Random random(number);
    std::string piece(1 + random.below(140), 'a');
    for (char& c : piece) c = "aaab"[random.below(4)];
    ASSERT_EQ(tokenizer.encode(piece), by_definition(model, piece)) << piece;
  }
}

TEST(ByteLevelBpe, AMegabyteWithoutASpaceIsQuick) {
  // Quadratic time would take many minutes and hit the test's time limit.
  const ByteLevelBpe tokenizer(golden_model(false));
  for (const std::string unit : {"a", "ab", "lifetime"}) {
    std::string text;
    while (text.size() < (size_t{1} << 20)) text += unit;
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
}

TEST(ByteLevelBpe, ThreadsMayShareOne) {
  const ByteLevelBpe tokenizer(golden_model(false));
  std::vector<Ids> alone(8), together(8);
  for (uint64_t i = 0; i < 8; ++i) alone[i] = tokenizer.encode(fuzz_text(i));
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 50; ++repeat) together[i] = tokenizer.encode(fuzz_text(i));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(together, alone);
}

TEST(ByteLevelBpe, AStablePrefixIsEncodedTheSameWhateverFollows) {
  BpeModel model = golden_model(false);
  // An added token that ordinary cuts would go through.
  model.added.push_back({static_cast<int32_t>(model.tokens.size()), "<new file>", true, false});
  model.tokens.emplace_back("<new file>");
  const ByteLevelBpe tokenizer(model);
  for (uint64_t number = 0; number < 200; ++number) {
    std::string text = damaged_text(number);
    Random random(number);
    for (int i = 0; i < 20; ++i)
      text.insert(random.below(text.size()), i % 4 ? "<new file>" : "<new ");
    const Ids whole = tokenizer.encode(text);
    for (int cuts = 0; cuts < 40; ++cuts) {
      const size_t seen = random.below(text.size() + 1);
      const size_t stable = tokenizer.stable_prefix(std::string_view(text).substr(0, seen));
      Ids joined = tokenizer.encode(text.substr(0, stable));
      tokenizer.encode_to(std::string_view(text).substr(stable), joined);
      ASSERT_EQ(joined, whole) << "number " << number << ", seen " << seen << ", stable " << stable;
    }
  }
}

TEST(ByteLevelBpe, OfAddedTokensTheLeftmostAndThenTheLongestIsTaken) {
  BpeModel model = model_of({});
  for (const std::string content : {"<a>", "<a><b>", "a><"}) {
    model.added.push_back({static_cast<int32_t>(model.tokens.size()), content, true, false});
    model.tokens.push_back(content);
  }
  const ByteLevelBpe tokenizer(model);
  EXPECT_EQ(tokenizer.encode("<a><b><a>"), (Ids{257, 256}));
  EXPECT_EQ(tokenizer.encode("xa><a>").size(), 4u);  // x, "a><", a, >
}

TEST(ByteLevelBpe, AWholePieceMayComeBeforeItsMerges) {
  BpeModel model = model_of({{"a", "b"}, {"b", "c"}, {"a", "bc"}});
  EXPECT_EQ(ByteLevelBpe(model).encode("abc"), (Ids{256, 66}));
  model.whole_pieces_first = true;
  EXPECT_EQ(ByteLevelBpe(model).encode("abc"), (Ids{258}));
}

TEST(ByteLevelBpe, AByteWithoutATokenIsLeftOutAsTokenizersLeavesItOut) {
  BpeModel model = model_of({{"a", "b"}});
  const auto hole = std::find(model.tokens.begin(), model.tokens.end(), std::string(1, '\x13'));
  hole->clear();
  EXPECT_EQ(ByteLevelBpe(model).encode("x\x13"
                                       "a\x13"
                                       "b"),
            (Ids{87, 64, 65}));
  EXPECT_EQ(ByteLevelBpe(model).encode("\x13"), Ids{});
}

TEST(ByteLevelBpe, IdsOutsideTheVocabularyAreRefused) {
  const ByteLevelBpe tokenizer(model_of({}));
  EXPECT_NE(error_of([&] {
              tokenizer.decode({3, 256});
            }).find("token id 256 is outside the vocabulary 0 .. 255"),
            std::string::npos);
  EXPECT_NE(error_of([&] { tokenizer.token_bytes(-1); }), "");
}

TEST(ByteLevelBpe, ImpossibleModelsAreRefused) {
  const auto refused = [](BpeModel model, const std::string& reason) {
    EXPECT_NE(error_of([&] { ByteLevelBpe{std::move(model)}; }).find(reason), std::string::npos)
        << reason;
  };
  BpeModel twice = model_of({{"a", "b"}});
  twice.merges.push_back(twice.merges[0]);
  refused(twice, "stands there twice");
  BpeModel missing = model_of({});
  missing.merges.emplace_back(64, 65);
  refused(missing, "not in the vocabulary");
  BpeModel outside = model_of({});
  outside.merges.emplace_back(64, 256);
  refused(outside, "joins the ids");
  // Nothing makes the left part.
  BpeModel cycle = model_of({});
  cycle.tokens.insert(cycle.tokens.end(), {"ab", "abc"});
  cycle.merges.emplace_back(256, 66);
  refused(cycle, "neither a byte nor made by a merge");
  BpeModel equal = model_of({{"a", "b"}});
  equal.tokens.emplace_back("ab");
  refused(equal, "stands twice");
  BpeModel nothing = model_of({});
  nothing.tokens.emplace_back();
  nothing.merges.emplace_back(64, 256);
  refused(nothing, "joins a token with nothing");
  BpeModel added = model_of({});
  added.added.push_back({3, "<x>", true, false});
  refused(added, "differs from the vocabulary's");
}

TEST(ByteLevelBpe, FingerprintsTellModelsApart) {
  const BpeModel model = model_of({{"a", "b"}});
  BpeModel digits = model, swapped = model_of({{"b", "a"}});
  digits.split.digits = true;
  const auto of = [](BpeModel one) { return ByteLevelBpe(std::move(one)).fingerprint(); };
  EXPECT_EQ(of(model), of(model));
  EXPECT_NE(of(model), of(digits));
  EXPECT_NE(of(model), of(swapped));
}

}  // namespace
}  // namespace natslm::data
