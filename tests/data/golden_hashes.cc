// SPDX-License-Identifier: Apache-2.0
#include "tests/data/golden_hashes.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "natslm/base/atomic_file.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {

void expect_golden_hashes(BpeModel model, const std::filesystem::path& file, uint32_t blocks) {
  const auto golden = nlohmann::json::parse(read_file(file));
  for (const bool digits : {false, true}) {
    model.split.digits = digits;
    const ByteLevelBpe tokenizer(model);
    const nlohmann::json& hashes = golden[digits ? "digits" : "plain"];
    ASSERT_EQ(hashes["blocks"].size(), kBlocks);
    for (uint32_t block = 0; block < blocks; ++block) {
      EXPECT_EQ(hash_of(tokenizer.encode(block_text(block))), hashes["blocks"][block])
          << "code points from " << block * kBlock << ", digits " << digits;
    }
    ASSERT_GE(hashes["fuzz"].size(), 1000u);
    for (uint64_t number = 0; number < hashes["fuzz"].size(); ++number) {
      EXPECT_EQ(hash_of(tokenizer.encode(fuzz_text(number))), hashes["fuzz"][number])
          << "fuzz " << number << ", digits " << digits;
    }
  }
}

}  // namespace natslm::data
