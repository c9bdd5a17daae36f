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

// How the work is cut: rows (a query of one head) of a query tile, and parts of its keys.
struct WholeCut {
  int32_t rows, parts;
};

// The fewer rows, the sooner a query tile is done, and the more of them share the device; the more,
// the less often keys are read. One H200, 64 rows in 4 / 2 / 1 parts and 128 rows: 12/12/64, one
// sequence of 256, 512, 1,024, 2,048 tokens: 5.2 / 5.3 / 6.5 / 7.3, 7.1 / 7.5 / 10 / 12, 11 / 14 /
// 19 / 20, 30 / 26 / 37 / 41 us; 32/8/128, one of 512, 1,024: - / 12 / 13 / 14, - / 31 / 27 / 26.
// 128 / 192 rows, 16,384 tokens of 32/8/128 in texts of 128, 256, 512, 1,024: 114 / 111, 150 / 143,
// 210 / 195, 370 / 325 us.
constexpr WholeCut whole_cut(int32_t head_dim, int64_t heads, int64_t rows_of_head,
                             int32_t multiprocessors) {
  const auto tiles = [&](int64_t rows) { return heads * ((rows_of_head + rows - 1) / rows); };
  const int64_t blocks = multiprocessors;
  if (head_dim == 64 && tiles(64) <= 2 * blocks) return {64, 4};
  if (tiles(64) <= (head_dim == 64 ? 4 : 2) * blocks) return {64, 2};
  if (head_dim == 64 || tiles(128) <= 2 * blocks) return {128, 1};
  return {192, 1};
}
// Teams of a block, as many as have registers: of warpgroups that share query tiles of `rows` rows,
// or, with several parts, the keys of 64 rows.
constexpr int whole_teams(int32_t head_dim, int32_t rows, int32_t parts) {
  return (head_dim == 64 ? 4 : rows == 192 ? 3 : 2) / (rows / 64 * parts);
}

// k and v: boxes of kWholeKeys rows. One block per multiprocessor, or per query tile where there
// are fewer.
template <int kHeadDim, int kRows, int kParts>
void launch_attention_whole(const WholeArguments& arguments, int multiprocessors,
                            CUstream_st* stream);

}  // namespace natslm::kernels::sm90
