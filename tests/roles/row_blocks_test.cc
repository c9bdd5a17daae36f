// How the GPU cuts a row of tokens into blocks, on the CPU.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/cuda/row_blocks.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace natslm::roles {
namespace {

constexpr int32_t kChunks[] = {1, 2, 3, 7, 16, 100, 1023, 1024, 1025, 5000, kMaxPosition};
constexpr int32_t kTogether[] = {1, 2, 8, kMaxTogether};

void expect_whole(int32_t tokens, int32_t chunk, int32_t together) {
  const RowBlocks cut = row_blocks(tokens, chunk, together);
  const int64_t slots = (int64_t{tokens} + chunk - 1) / chunk;
  ASSERT_GE(cut.count, 1);
  ASSERT_GE(cut.chunks, 1);
  ASSERT_LE(cut.chunks, kMaxChunks);
  ASSERT_LE(int64_t{cut.chunks} * chunk, std::max(chunk, kMaxChunks)) << "a block's tokens";
  ASSERT_GE(int64_t{cut.chunks} * cut.count, slots) << "every token has a block";
  if (cut.together) {
    ASSERT_LE(cut.count, together);
    ASSERT_EQ(cut.count & (cut.count - 1), 0) << "a size that a cluster can have";
  } else {
    ASSERT_GT(cut.count, together) << "one launch would have done";
    ASSERT_LT(int64_t{cut.chunks} * (cut.count - 1), slots) << "no block is empty";
  }
}

TEST(RowBlocks, HaveAPlaceForEveryTokenAndNeverTooManyChunks) {
  for (const int32_t together : kTogether) {
    for (const int32_t chunk : kChunks) {
      for (int32_t tokens = 0; tokens < 40'000; ++tokens) {
        expect_whole(tokens, chunk, together);
        if (HasFailure()) FAIL() << tokens << " tokens, chunk " << chunk << ", " << together;
      }
      for (const int32_t tokens : {1 << 20, (1 << 20) + 1, kMaxPosition}) {
        expect_whole(tokens, chunk, together);
      }
    }
  }
}

TEST(RowBlocks, OneLaunchDoesRowsOfSixteenThousandTokensOnHopper) {
  EXPECT_TRUE(row_blocks(16384, 1, kMaxTogether).together);
  EXPECT_EQ(row_blocks(16384, 1, kMaxTogether).count, 16);
  EXPECT_FALSE(row_blocks(16385, 1, kMaxTogether).together);
  EXPECT_TRUE(row_blocks(1024, 1, 1).together);
  EXPECT_EQ(row_blocks(1024, 1, kMaxTogether).count, 1);
  EXPECT_EQ(row_blocks(0, 1, kMaxTogether).count, 1);
}

}  // namespace
}  // namespace natslm::roles
