// Compares ids with the hashes that tools/golden_tokenizer.py recorded.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>

#include "natslm/data/byte_level_bpe.h"

namespace natslm::data {

// Both split rules: the fuzz texts, and the first `blocks` blocks of code points.
void expect_golden_hashes(BpeModel model, const std::filesystem::path& file, uint32_t blocks);

}  // namespace natslm::data
