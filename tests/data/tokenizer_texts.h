// The texts whose ids tools/golden_tokenizer.py records as hashes only: the same formulas in both
// places. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"

namespace natslm::data {

using test::error_of;
using test::ScratchFolder;

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  uint64_t below(uint64_t limit) { return next() % limit; }

 private:
  uint64_t state_;
};

std::string utf8(uint32_t code_point);

inline constexpr uint32_t kBlock = 1024, kBlocks = 0x110000 / kBlock;
// Each code point of a block beside letters, digits, spaces, an apostrophe and itself.
std::string block_text(uint32_t block);
std::string fuzz_text(uint64_t number);
// Any bytes: valid text with invalid bytes thrown in.
std::string damaged_text(uint64_t number);
std::string hash_of(const std::vector<int32_t>& ids);

// tests/golden/tokenizer
std::filesystem::path golden_folder();
// Data that lies beside the checkout on some machines; tests that want it are skipped without.
std::filesystem::path shared_data();
void write_file(const std::filesystem::path& path, std::string_view contents);

}  // namespace natslm::data
