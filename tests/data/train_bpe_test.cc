// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/train_bpe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/data/tokenizer_json.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using Merges = std::vector<std::pair<std::string, std::string>>;

Merges merges_of(const BpeModel& model) {
  Merges merges;
  for (const auto& [left, right] : model.merges)
    merges.emplace_back(model.tokens[left], model.tokens[right]);
  return merges;
}

std::unique_ptr<ByteLevelBpe> train(const std::vector<std::string>& texts,
                                    BpeTrainingOptions options) {
  BpeTrainer trainer(options);
  for (const std::string& text : texts) trainer.add(text);
  return trainer.train();
}

// Counts everything anew for each merge.
Merges by_brute_force(const std::string& text, int merges, int64_t least) {
  std::vector<std::string> tokens;
  for (const char byte : byte_level_alphabet()) tokens.emplace_back(1, byte);
  std::vector<size_t> ends(text.size() + 1);
  ends.resize(Gpt2Splitter(false).split(text, 0, ends.data(), ends.size()));
  std::vector<std::vector<int>> words;
  size_t begin = 0;
  for (const size_t end : ends) {
    std::vector<int>& word = words.emplace_back();
    for (size_t at = begin; at < end; ++at) {
      word.push_back(static_cast<int>(std::find(tokens.begin(), tokens.end(), text.substr(at, 1)) -
                                      tokens.begin()));
    }
    begin = end;
  }
  Merges result;
  while (static_cast<int>(tokens.size()) < 256 + merges) {
    std::map<std::pair<int, int>, int64_t> counts;
    for (const auto& word : words) {
      for (size_t i = 1; i < word.size(); ++i) ++counts[{word[i - 1], word[i]}];
    }
    const std::pair<const std::pair<int, int>, int64_t>* best = nullptr;
    for (const auto& entry : counts) {  // ascending, so the first of equals stays
      if (!best || entry.second > best->second) best = &entry;
    }
    if (!best || best->second < least) break;
    const auto [left, right] = best->first;
    const std::string joined = tokens[left] + tokens[right];
    auto found = std::find(tokens.begin(), tokens.end(), joined);
    if (found == tokens.end()) found = tokens.insert(found, joined);
    const int id = static_cast<int>(found - tokens.begin());
    result.emplace_back(tokens[left], tokens[right]);
    for (auto& word : words) {
      std::vector<int> merged;
      for (size_t i = 0; i < word.size(); ++i) {
        const bool here = i + 1 < word.size() && word[i] == left && word[i + 1] == right;
        merged.push_back(here ? id : word[i]);
        i += here;
      }
      word = merged;
    }
  }
  return result;
}

TEST(TrainBpe, MakesTheMergesThatTokenizersMakes) {
  const BpeModel golden = read_tokenizer_json(golden_folder() / "tokenizer.json");
  const auto ours = train({read_file(golden_folder() / "training.txt")}, {.vocabulary = 1024});
  EXPECT_EQ(merges_of(ours->model()), merges_of(golden));
  EXPECT_EQ(ours->fingerprint(), ByteLevelBpe(golden).fingerprint());
}

TEST(TrainBpe, EqualsCountingEverythingAnewForEachMerge) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Random random(seed);
    std::string text;
    for (int i = 0; i < 600; ++i) text += "aaab c"[random.below(6)];
    const int merges = 60;
    const auto ours = train(
        {text}, {.vocabulary = 257 + merges, .least_count = 1 + static_cast<int64_t>(seed % 3)});
    Merges expected = by_brute_force(text, merges, 1 + static_cast<int64_t>(seed % 3));
    ASSERT_EQ(merges_of(ours->model()), expected) << "seed " << seed;
  }
}

TEST(TrainBpe, TheOrderAndTheCutsOfTheTextDoNotMatter) {
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 30; ++i) texts.push_back(fuzz_text(i));
  const auto forward = train(texts, {.vocabulary = 700});
  std::ranges::reverse(texts);
  EXPECT_EQ(train(texts, {.vocabulary = 700})->fingerprint(), forward->fingerprint());

  BpeTrainer in_blocks({.vocabulary = 700});
  for (const std::string& text : texts) {
    std::string pending;
    for (size_t at = 0; at < text.size(); at += 7) {
      pending += text.substr(at, 7);
      const size_t ready = in_blocks.stable_prefix(pending);
      in_blocks.add(pending.substr(0, ready));
      pending.erase(0, ready);
    }
    in_blocks.add(pending);
  }
  EXPECT_EQ(in_blocks.train()->fingerprint(), forward->fingerprint());
}

TEST(TrainBpe, BytesComeFirstAndEndOfTextLast) {
  const auto tokenizer = train({"low lower lowest"}, {.vocabulary = 259});
  EXPECT_EQ(tokenizer->vocabulary(), 259);
  EXPECT_EQ(tokenizer->end_of_text(), 258);
  EXPECT_EQ(tokenizer->token_bytes(0), "!");
  EXPECT_EQ(tokenizer->token_bytes(256), "lo");
  EXPECT_EQ(tokenizer->token_bytes(257), "low");
  EXPECT_EQ(train({"x"}, {.vocabulary = 257})->vocabulary(), 257);
}

TEST(TrainBpe, AShortTextGivesFewerTokens) {
  EXPECT_LT(train({"a short text, a short word"}, {.vocabulary = 50000})->vocabulary(), 300);
}

TEST(TrainBpe, EndOfTextInTheTextIsNotCounted) {
  const auto tokenizer = train({"ab<|endoftext|>ab<|endoftext|>"}, {.vocabulary = 400});
  EXPECT_EQ(merges_of(tokenizer->model()), (Merges{{"a", "b"}}));
}

TEST(TrainBpe, OneLongPieceIsQuick) {
  std::string text;
  Random random(1);
  while (text.size() < 300000) text += static_cast<char>('a' + random.below(16));
  EXPECT_EQ(train({text + std::string(300000, 'z')}, {.vocabulary = 1000})->vocabulary(), 1000);
}

TEST(TrainBpe, ImpossibleRequestsAreRefused) {
  EXPECT_NE(error_of([] { BpeTrainer({.vocabulary = 256}); }).find("257"), std::string::npos);
  EXPECT_NE(error_of([] { BpeTrainer({.vocabulary = 300, .least_count = 0}); }), "");
  EXPECT_NE(error_of([] { train({}, {}); }).find("no text"), std::string::npos);
  EXPECT_NE(error_of([] { train({""}, {}); }).find("no text"), std::string::npos);
}

TEST(TrainBpe, ReadsACorpusOfFilesAndJsonLines) {
  const ScratchFolder folder;
  write_file(folder / "c/a.txt", "low lower");
  write_file(folder / "c/b.jsonl", "{\"text\": \"lowest\"}\n{\"text\": \"low\"}\n");
  EXPECT_EQ(train_bpe(find_text({folder / "c"}), {.vocabulary = 300})->fingerprint(),
            train({"low lower", "lowest", "low"}, {.vocabulary = 300})->fingerprint());
}

}  // namespace
}  // namespace natslm::data
