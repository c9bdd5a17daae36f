// All code points, and what needs vocabularies that are not part of this repository.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "natslm/data/tokenizer_json.h"
#include "tests/data/both_splitters.h"
#include "tests/data/golden_hashes.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

TEST(Exhaustive, ByHandEqualsPcre2ForEachCodePointBesideEachKindOfNeighbour) {
  for (const bool digits : {false, true}) {
    for (uint32_t block = 0; block < kBlocks; ++block) {
      const std::string text = block_text(block);
      ASSERT_EQ(by_hand(text, digits), by_pattern(text, digits)) << "block " << block << digits;
    }
  }
}

TEST(Exhaustive, ByHandEqualsPcre2ForManyRandomTextsAndDamagedOnes) {
  for (uint64_t number = 1000; number < 6000; ++number) {
    for (const std::string& text : {fuzz_text(number), damaged_text(number)}) {
      for (const bool digits : {false, true}) {
        ASSERT_EQ(by_hand(text, digits), by_pattern(text, digits)) << "number " << number << digits;
      }
    }
  }
}

TEST(Exhaustive, GivesTheIdsThatTokenizersGivesForEachCodePoint) {
  expect_golden_hashes(read_tokenizer_json(golden_folder() / "tokenizer.json"),
                       golden_folder() / "hashes.json", kBlocks);
}

TEST(Exhaustive, GivesTheIdsThatTokenizersGivesWithGpt2sVocabulary) {
  const auto folder = shared_data() / "tokenizers" / "gpt2";
  if (!std::filesystem::exists(folder)) {
    GTEST_SKIP() << "EXTRA NOT RUN: needs GPT-2's files in " << folder;
  }
  expect_golden_hashes(read_vocabulary_and_merges(folder / "encoder.json", folder / "vocab.bpe"),
                       golden_folder() / "gpt2_hashes.json", kBlocks);
}

}  // namespace
}  // namespace natslm::data
