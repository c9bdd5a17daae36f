// What the GPU kernels prepare on the device before attention: keys and values gathered into a
// KeyOrder with the runs that each query tile reads, or, in position order, bounds of the lifetimes
// by which key tiles are skipped; and a work list with the longest tiles first. Nothing here waits
// for the device.
//
// A query tile is `tile_queries` consecutive positions of one (sequence, KV head), whatever the
// number of query heads that share it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels::cuda {

// Places [begin, end) of the order: the keys that some query of a tile reads lie in there. Those of
// [full_begin, full_end) are read by every query of the tile (begin <= full_begin <= full_end <=
// end); the others need a test of position and last.
struct KeyRun {
  int32_t begin, full_begin, full_end, end;
};

struct PlanShape {
  int32_t batch, kv_heads, tokens, head_dim;
  int32_t tile_queries;
  constexpr int32_t tiles() const { return (tokens + tile_queries - 1) / tile_queries; }
  constexpr int64_t work_items() const { return int64_t{batch} * kv_heads * tiles(); }
};

// What sorting the work list needs while it runs.
struct WorkScratch {
  uint16_t* bucket;  // [work_items]
  uint32_t* counts;  // [chunks, kWorkBuckets] of key_runs.h
};

// Views into a workspace; all device memory.
struct SortedKeys {
  void* k;  // [B, Hkv, T, D] bfloat16 contiguous, row s = the key at place s of the order;
  void* v;  // likewise; rows past a length are 0
  int32_t* position;   // [B, Hkv, T] of the key at place s; kMaxPosition past a length
  int32_t* last;       // [B, Hkv, T] likewise; -1 past a length
  KeyRun* runs;        // [B, Hkv, tiles, KeyOrder::kSegments]; empty (all 0) past a length
  int32_t* work;       // [work_items] (b * Hkv + h) * tiles + tile, most keys first (in
                       // buckets, key_runs.h); ties by number
  int32_t* next_item;  // 0: for the kernel that hands out the work
  WorkScratch scratch;
};
size_t sorted_keys_bytes(const PlanShape& shape);
// Places the views at the start of `workspace` (256-byte aligned).
SortedKeys sorted_keys_in(void* workspace, const PlanShape& shape);
// Fills them. k and v with their strides, last, lengths (or null) and order as in the contracts.
// Three launches, of which the first is plain and the last lets one more begin before it has ended
// (dependent_launch.cuh); as has launch_position_bounds.
void launch_sort_keys(const PlanShape& shape, const void* k, Strides k_stride, const void* v,
                      Strides v_stride, const int32_t* last, const int32_t* lengths,
                      const KeyOrder& order, const SortedKeys& to, CUstream_st* stream);

// Position order: key tiles of kBoundKeys keys.
inline constexpr int32_t kBoundKeys = 64;
struct PositionBounds {
  int32_t* min_last;   // [B, Hkv, ceil(T / kBoundKeys)] over the keys of a tile below the length;
  int32_t* max_last;   // likewise; an empty tile has min_last = kForever, max_last = -1
  int32_t* work;       // [work_items] as above, by the number of key tiles that are not dead
  int32_t* next_item;  // as above
  WorkScratch scratch;
};
size_t position_bounds_bytes(const PlanShape& shape);
PositionBounds position_bounds_in(void* workspace, const PlanShape& shape);
void launch_position_bounds(const PlanShape& shape, const int32_t* last, const int32_t* lengths,
                            const PositionBounds& to, CUstream_st* stream);

}  // namespace natslm::kernels::cuda
