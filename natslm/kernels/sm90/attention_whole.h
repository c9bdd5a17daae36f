// The Hopper forward kernel that reads every key up to the query, as its host code sees it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/attention_forward.h"

namespace natslm::kernels::sm90 {

struct WholeArguments : ForwardArguments {  // of which position, runs, bounds and work are unused
  int32_t heads;                            // B * Hkv
  int32_t heads_together;                   // cuda::head_span
};

inline constexpr int32_t kWholeKeys = 64;  // of a tile

// Rows (a query of one head) of a query tile, of all multiprocessors of the device: the fewer, the
// sooner a query tile is done, and the more of them share the device; the more, the less often keys
// are read. One H200, 12/12/64 and 32/8/128, 64 / 128 / 192 rows: 1 x 256 tokens 7 / 7 / 8 us and
// 8 / 9 / 10; 32 x 512 tokens 63 / 58 / 74 and 261 / 224 / 200; 1 x 2,048 of 32/8/128 89 / 79 / 75.
constexpr int32_t whole_rows(int32_t head_dim, int64_t heads, int64_t rows_of_head,
                             int32_t multiprocessors) {
  const auto tiles = [&](int64_t rows) { return heads * ((rows_of_head + rows - 1) / rows); };
  if (tiles(64) <= (head_dim == 64 ? 4 : 1) * int64_t{multiprocessors}) return 64;
  if (head_dim == 64 || rows_of_head <= 1024 || tiles(128) <= 2 * int64_t{multiprocessors}) {
    return 128;
  }
  return 192;
}
// Teams of a block, as many as have registers: warpgroups that share query tiles of `rows` rows.
constexpr int whole_teams(int32_t head_dim, int32_t rows) {
  return (head_dim == 64 ? 4 : rows == 192 ? 3 : 2) / (rows / 64);
}

// k and v: boxes of kWholeKeys rows. One block per multiprocessor, or per query tile where there
// are fewer.
template <int kHeadDim, int kRows>
void launch_attention_whole(const WholeArguments& arguments, int multiprocessors,
                            CUstream_st* stream);

}  // namespace natslm::kernels::sm90
