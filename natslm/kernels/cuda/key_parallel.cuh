// What kernels have in common in which a block owns a span of keys and walks over the queries that
// read them (backward of keys and values; sums over queries).
//
// Scores are transposed: rows are keys, columns queries of one query head. A warp owns 32 keys, so
// that each query fragment serves two key fragments.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/cuda/key_plan.h"
#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/cuda/mma.cuh"
#include "natslm/kernels/cuda/query_parallel.cuh"

namespace natslm::kernels::cuda {

inline constexpr int kKeysOfWarp = 32;
// Fewer of large heads, so that two tiles of queries fit beside the keys.
template <int kHeadDim>
inline constexpr int kQueriesOfTile = kHeadDim <= 128 ? 64 : 32;

// The keys of a block.
struct KeyBlock {
  int32_t batch, kv_head;
  int64_t head;    // batch * kv_heads + kv_head
  int32_t length;  // of the sequence
  KeySpan span;
};

__device__ inline KeyBlock key_block(const KeySource& keys, int32_t spans, int32_t heads_together,
                                     int32_t keys_of_span) {
  const HeadSpan mine = head_span(static_cast<int32_t>(blockIdx.x), keys.batch * keys.kv_heads,
                                  spans, heads_together);
  KeyBlock block;
  block.batch = mine.head / keys.kv_heads;
  block.kv_head = mine.head % keys.kv_heads;
  block.head = mine.head;
  block.length = keys.lengths ? keys.lengths[block.batch] : keys.tokens;
  int32_t ends[KeyOrder::kSegments] = {block.length, block.length, block.length};
  if (keys.ends) {
#pragma unroll
    for (int s = 0; s < KeyOrder::kSegments; ++s) {
      ends[s] = keys.ends[block.head * KeyOrder::kSegments + s];
    }
  }
  block.span = key_span(mine.span, ends, keys.tokens, keys_of_span);
  return block;
}

// How many heads' queries share the L2 cache, see head_span: a share of the smallest L2 (40 MB) of
// the chips that these kernels are for.
inline int32_t heads_together(int64_t heads, int64_t bytes_of_head) {
  constexpr int64_t kBytes = 16 << 20;
  const int64_t together = kBytes / (bytes_of_head > 0 ? bytes_of_head : 1);
  return static_cast<int32_t>(together < 1 ? 1 : together > heads ? heads : together);
}

// Starts the copy of the span's rows of a [B, Hkv, T, D] array; rows past the span become 0.
template <int kHeadDim, int kKeys, int kThreads>
__device__ inline void copy_span_async(uint8_t* to, int thread, const BFloat16* from,
                                       const Strides& stride, int32_t step, const KeyBlock& block) {
  copy_rows_async<kHeadDim, kKeys, kThreads>(
      shared_address(to), thread, from + block.batch * stride.batch + block.kv_head * stride.head,
      step, [&](int row, int) {
        const int32_t place = block.span.begin + row;
        return place < block.span.end ? place : -1;
      });
}

// Numbers of the first and the last tile of queries that a block reads; last < first: none.
struct QueryRange {
  int32_t first, last;
};
template <int kQueries>
__device__ inline QueryRange query_range(int32_t first_query, int32_t last_query) {
  if (last_query < first_query) return {0, -1};
  return {first_query / kQueries, last_query / kQueries};
}

// The tiles of a range, for each head of the group. All threads walk alike.
template <int kQueries>
struct QueryWalk {
  int32_t head = 0, tile;

  __device__ explicit QueryWalk(const QueryRange& range) : tile(range.first) {}
  __device__ bool done(const QueryRange& range, int32_t group) const {
    return head == group || range.last < range.first;
  }
  __device__ void next(const QueryRange& range) {
    if (++tile > range.last) {
      tile = range.first;
      ++head;
    }
  }
  __device__ int32_t position() const { return tile * kQueries; }
};

// One tile of queries in shared memory.
template <int kHeadDim>
struct QueryStage {
  static constexpr int kQueries = kQueriesOfTile<kHeadDim>;
  alignas(kTileAlignment<kHeadDim>) uint8_t q[kQueries * kRowBytes<kHeadDim>];
  alignas(kTileAlignment<kHeadDim>) uint8_t dout[kQueries * kRowBytes<kHeadDim>];
  alignas(16) float lse[kQueries];
  alignas(16) float delta[kQueries];
};

// Starts the copy of the walk's present tile. Queries past the length become 0.
template <int kHeadDim, int kThreads>
__device__ inline void copy_query_tile_async(QueryStage<kHeadDim>& to, int thread,
                                             const QuerySource& from, const KeyBlock& block,
                                             const QueryWalk<kQueriesOfTile<kHeadDim>>& walk,
                                             int32_t tokens) {
  constexpr int kQueries = kQueriesOfTile<kHeadDim>;
  const int32_t first = walk.position();
  const int32_t q_head = block.kv_head * from.group + walk.head;
  const auto copy = [&](uint8_t* tile, const BFloat16* array, const Strides& stride, int32_t step) {
    copy_rows_async<kHeadDim, kQueries, kThreads>(
        shared_address(tile), thread, array + block.batch * stride.batch + q_head * stride.head,
        step, [&](int row, int) { return first + row < block.length ? first + row : -1; });
  };
  copy(to.q, from.q, from.q_stride, from.q_step);
  if (from.dout) copy(to.dout, from.dout, from.dout_stride, from.dout_step);
  const int64_t terms = (block.head * from.group + walk.head) * tokens + first;
  static_assert(kThreads >= 2 * kQueries);
  const int row = thread % kQueries;
  const bool valid = first + row < tokens;
  if (thread < kQueries) {
    copy_4_async(shared_address(&to.lse[row]),
                 valid ? from.terms.lse + terms + row : from.terms.lse, valid);
  } else if (thread < 2 * kQueries && from.terms.delta) {
    copy_4_async(shared_address(&to.delta[row]),
                 valid ? from.terms.delta + terms + row : from.terms.delta, valid);
  }
}

// The positions and lifetimes that a set of keys spans; no key: never read.
struct KeyBounds {
  int32_t first = kMaxPosition, last = -1;  // positions
  int32_t min_last = kForever, max_last = -1;
  int32_t max_horizon = -1;
};

// The span's keys in shared memory: what decides which query reads them, and with the block and the
// bounds of its warps all that accumulators leave no registers for. A key past the end of the
// span is never read.
template <int kKeys>
struct KeyTable {
  static constexpr int kNone = kMaxPosition;
  int32_t position[kKeys];
  int32_t last[kKeys];
  int32_t horizon[kMaxHorizons][kKeys];  // at most length - 1

  // All threads; a barrier must follow. horizons: [count, B, Hkv, T] by position.
  __device__ void fill(const KeySource& keys, const KeyBlock& block, const int32_t* horizons,
                       int32_t count, int thread, int threads) {
    const int64_t plane = int64_t{keys.batch} * keys.kv_heads * keys.tokens;
    const int64_t row = block.head * keys.tokens;
    for (int i = thread; i < kKeys; i += threads) {
      const int32_t place = block.span.begin + i;
      const bool in_span = place < block.span.end;
      const int32_t at = !in_span ? kNone : keys.position ? keys.position[row + place] : place;
      position[i] = at;
      last[i] = in_span ? keys.last[row + place] : -1;
      for (int h = 0; h < count; ++h) {
        horizon[h][i] = in_span ? min(horizons[h * plane + row + at], block.length - 1) : -1;
      }
    }
  }

  // Of keys [begin, begin + 32 * kPerLane) that are in the span: a warp together.
  template <int kPerLane>
  __device__ KeyBounds bounds(int begin, int lane, int32_t horizon_count) const {
    KeyBounds of;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int key = begin + i * kWarpSize + lane;
      if (position[key] == kNone) continue;
      of.first = min(of.first, position[key]);
      of.last = max(of.last, position[key]);
      of.min_last = min(of.min_last, last[key]);
      of.max_last = max(of.max_last, last[key]);
      for (int h = 0; h < horizon_count; ++h) {
        of.max_horizon = max(of.max_horizon, horizon[h][key]);
      }
    }
    of.first = __reduce_min_sync(~0u, of.first);
    of.last = __reduce_max_sync(~0u, of.last);
    of.min_last = __reduce_min_sync(~0u, of.min_last);
    of.max_last = __reduce_max_sync(~0u, of.max_last);
    of.max_horizon = __reduce_max_sync(~0u, of.max_horizon);
    return of;
  }
};

// Sums of a number per (key, query) pair over j <= i <= horizon, one per horizon and key. A lane
// holds four keys of its warp's 32 and some of the queries.
struct HorizonSums {
  float sum[kMaxHorizons][2][2];  // [horizon][m][half]

  __device__ HorizonSums() {
#pragma unroll
    for (int h = 0; h < kMaxHorizons; ++h)
      sum[h][0][0] = sum[h][0][1] = sum[h][1][0] = sum[h][1][1] = 0;
  }

  // Writes the sums of the warp's keys to [count, B, Hkv, T], by position.
  template <int kKeys>
  __device__ void write(float* to, const KeyTable<kKeys>& table, int first_key, int lane,
                        int32_t count, const KeySource& keys, int64_t head) {
    const int64_t plane = int64_t{keys.batch} * keys.kv_heads * keys.tokens;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t position = table.position[first_key + m * 16 + half * 8 + lane / 4];
#pragma unroll
        for (int h = 0; h < kMaxHorizons; ++h) {
          if (h >= count) break;
          float s = sum[h][m][half];
          s += __shfl_xor_sync(~0u, s, 1);
          s += __shfl_xor_sync(~0u, s, 2);
          if (lane % 4 == 0 && position != KeyTable<kKeys>::kNone) {
            to[h * plane + head * keys.tokens + position] = s;
          }
        }
      }
    }
  }
};

// Adds g of keys m * 16 + lane / 4 (+ 8) of a warp's and queries first_query .. + 8 kN to the sums.
// g: the accumulators of row fragment m. Not cut: each horizon is past all of these queries or
// before them.
template <bool kCut, int kN, int kKeys>
__device__ inline void add_to_sums(HorizonSums& sums, const float (&g)[kN][4], int m,
                                   const KeyTable<kKeys>& table, int first_key, int lane,
                                   int32_t count, int32_t first_query) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + m * 16 + half * 8 + lane / 4;
    float total = 0;
    if (!kCut) {
#pragma unroll
      for (int n = 0; n < kN; ++n) total += g[n][2 * half] + g[n][2 * half + 1];
    }
    const int32_t position = table.position[key];
#pragma unroll
    for (int h = 0; h < kMaxHorizons; ++h) {
      if (h >= count) break;
      const int32_t horizon = table.horizon[h][key];
      if (!kCut) {
        sums.sum[h][m][half] += horizon >= first_query ? total : 0;
        continue;
      }
      float added = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int32_t i = first_query + n * 8 + lane % 4 * 2 + x;
          added += visible(i, position, horizon) ? g[n][2 * half + x] : 0;
        }
      }
      sums.sum[h][m][half] += added;
    }
  }
}

// How the queries [q0, q0 + kQueries) meet the horizons of a warp's keys.
enum class Reach : uint8_t {
  kNone,   // no pair counts for any horizon
  kWhole,  // for each key and horizon all queries count, or none
  kCut,    // pairs need a test
};

template <int kQueries, int kKeys>
__device__ inline Reach reach_of(const KeyTable<kKeys>& table, const KeyBounds& bounds,
                                 int first_key, int lane, int32_t count, int32_t q0) {
  const int32_t q1 = q0 + kQueries - 1;
  if (bounds.max_horizon < q0 || bounds.first > q1) return Reach::kNone;
  if (bounds.last > q0) return Reach::kCut;
  bool cut = false;
  for (int h = 0; h < count; ++h) {
    const int32_t horizon = table.horizon[h][first_key + lane];
    cut |= horizon >= q0 && horizon < q1;
  }
  return __any_sync(~0u, cut) ? Reach::kCut : Reach::kWhole;
}

}  // namespace natslm::kernels::cuda
