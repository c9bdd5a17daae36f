// What kernels have in common in which a block owns a tile of queries and walks over the keys that
// they read (forward; backward of the queries).
//
// The rows of a tile are queries of all query heads that share a KV head, position-major: row r is
// query head r % group of the tile's position r / group. Rows past the last whole position idle.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/key_plan.h"
#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/cuda/mma.cuh"

namespace natslm::kernels::cuda {

// A number per query, prepared for the kernels (row_terms.cuh): [B, Hq, T].
struct RowTerms {
  const float* lse;    // natural, and +inf where a query sees no key
  const float* delta;  // dout . out; null if not wanted
};

// The queries that a block reads: [B, Hq, T, D] arrays and their terms.
struct QuerySource {
  const BFloat16 *q, *dout;  // dout: null if not wanted
  Strides q_stride, dout_stride;
  RowTerms terms;
  int32_t group;
};

struct QueryTile {
  int32_t batch, kv_head;
  int64_t head;  // batch * kv_heads + kv_head
  PackedRows rows;
  int32_t first;      // position of the first query
  int32_t positions;  // of the tile, also past the length
  int32_t length;     // of the sequence
  int32_t tokens;

  __device__ int32_t last() const { return min(first + positions, length) - 1; }
  __device__ int32_t position(int row) const { return first + rows.position(row); }
  // Rows that hold a query of the sequence, and rows that the outputs have.
  __device__ bool in_use(int row) const {
    return rows.position(row) < positions && position(row) < length;
  }
  __device__ bool has_output(int row) const {
    return rows.position(row) < positions && position(row) < tokens;
  }
  // Of a row in a [B, Hq, T] array, and in one of [B, Hq, T, D].
  __device__ int64_t flat(int row) const {
    return (head * rows.group + rows.head(row)) * tokens + position(row);
  }
  __device__ int64_t offset(const Strides& stride, int row) const {
    return batch * stride.batch + (kv_head * rows.group + rows.head(row)) * stride.head +
           position(row) * stride.token;
  }
};

__device__ inline QueryTile query_tile(const KeyPlan& plan, int32_t group, int32_t work_item) {
  const int32_t number = plan.work[work_item];
  const int32_t head = number / plan.tiles;
  QueryTile tile;
  tile.batch = head / plan.keys.kv_heads;
  tile.kv_head = head % plan.keys.kv_heads;
  tile.head = head;
  tile.rows = packed_rows(group);
  tile.first = number % plan.tiles * plan.tile_queries;
  tile.positions = plan.tile_queries;
  tile.tokens = plan.keys.tokens;
  tile.length = plan.keys.lengths ? plan.keys.lengths[tile.batch] : plan.keys.tokens;
  return tile;
}

// Copies the tile's rows of a [B, Hq, T, D] array; rows not in use become 0.
template <int kHeadDim, int kRows, int kThreads>
__device__ inline void copy_queries_async(uint32_t to, int thread, const QueryTile& tile,
                                          const BFloat16* from, const Strides& stride) {
  copy_tile_async<kHeadDim, kRows, kThreads>(to, thread, from, [&](int row) {
    return tile.in_use(row) ? from + tile.offset(stride, row) : nullptr;
  });
}

// Writes rows first_row .. first_row + kRows of a shared tile to a [B, Hq, T, D] array, a warp's
// lanes side by side.
template <int kHeadDim, int kRows>
__device__ inline void write_queries(BFloat16* to, const Strides& stride, const QueryTile& tile,
                                     const uint8_t* from, int first_row, int lane) {
  constexpr int kChunks = kHeadDim / 8;
#pragma unroll
  for (int i = 0; i < kRows; i += kWarpSize / kChunks) {
    const int row = first_row + i + lane / kChunks;
    const int chunk = lane % kChunks;
    if (!tile.has_output(row)) continue;
    reinterpret_cast<uint4*>(to + tile.offset(stride, row))[chunk] =
        *reinterpret_cast<const uint4*>(from + tile_offset<kHeadDim>(row, chunk));
  }
}

// A key's part of the mask, as it lies in shared memory.
struct KeyLimits {
  int32_t position, last;
};

// Walks over the tiles of kKeys keys that a query tile reads. All threads walk alike.
template <int kKeys>
class KeyWalk {
 public:
  // `pieces`: shared memory, written here when the order is sorted. A barrier must follow.
  __device__ KeyWalk(const KeyPlan& plan, const QueryTile& tile, KeyPieces* pieces, int thread)
      : first_query_(tile.first), last_query_(tile.last()) {
    if (plan.runs) {
      const int32_t number = tile.first / plan.tile_queries;
      const KeyPieces mine =
          pieces_of(plan.runs + (tile.head * plan.tiles + number) * KeyOrder::kSegments);
      if (thread == 0) *pieces = mine;
      pieces_ = pieces;
      keys_ = mine.total();
      full_keys_ = mine.full;
    } else {
      const int64_t bounds = tile.head * ((tile.tokens + kBoundKeys - 1) / kBoundKeys);
      min_last_ = plan.min_last + bounds;
      max_last_ = plan.max_last + bounds;
      keys_ = tile.length;
      full_keys_ = 0;
    }
  }

  // Moves on to the next tile, the first one at first; false when there is none.
  __device__ bool next() {
    if (pieces_) {
      number_ = number_ < 0 ? 0 : number_ + kKeys;
      is_full_ = number_ + kKeys <= full_keys_;
      return number_ < keys_;
    }
    while (live_ == 0) {
      window_ += kWarpSize;
      if (window_ * kKeys > last_query_) return false;
      look_at_window();
    }
    const int bit = __ffs(live_) - 1;
    live_ &= live_ - 1;
    number_ = (window_ + bit) * kKeys;
    is_full_ = full_ >> bit & 1;
    return true;
  }

  // Number of the tile's first key, and whether every query reads all of the tile.
  __device__ int32_t number() const { return number_; }
  __device__ bool is_full() const { return is_full_; }
  // Place of a key; -1 past the last one.
  __device__ int32_t place(int32_t number) const {
    if (number >= keys_) return -1;
    return pieces_ ? place_of(*pieces_, number) : number;
  }

 private:
  // Classifies the tiles window_ .. window_ + 31.
  __device__ void look_at_window() {
    const int32_t number = (window_ + static_cast<int32_t>(threadIdx.x) % kWarpSize) * kKeys;
    Tile kind = Tile::kDead;
    if (number <= last_query_) {
      kind = classify(first_query_, last_query_, number, number + kKeys - 1,
                      min_last_[number / kBoundKeys], max_last_[number / kBoundKeys]);
    }
    live_ = __ballot_sync(~0u, kind != Tile::kDead);
    full_ = __ballot_sync(~0u, kind == Tile::kFull);
  }

  static_assert(kBoundKeys % kKeys == 0);
  int32_t first_query_, last_query_;
  const KeyPieces* pieces_ = nullptr;
  const int32_t* min_last_ = nullptr;
  const int32_t* max_last_ = nullptr;
  int32_t keys_ = 0, full_keys_ = 0;
  int32_t number_ = -1;
  bool is_full_ = false;
  int32_t window_ = -kWarpSize;
  uint32_t live_ = 0, full_ = 0;
};

// Where a (sequence, KV head) of a KeySource begins.
struct KeyHead {
  const BFloat16 *k, *v;
  int64_t k_step, v_step;  // from place to place
  const int32_t* last;
  const int32_t* position;  // null: the place itself
};
__device__ inline KeyHead key_head(const KeySource& keys, int32_t batch, int32_t kv_head) {
  const int64_t row = (int64_t{batch} * keys.kv_heads + kv_head) * keys.tokens;
  return {keys.k + batch * keys.k_stride.batch + kv_head * keys.k_stride.head,
          keys.v + batch * keys.v_stride.batch + kv_head * keys.v_stride.head,
          keys.k_stride.token,
          keys.v_stride.token,
          keys.last + row,
          keys.position ? keys.position + row : nullptr};
}

// Starts the copy of the walk's present tile: keys, values and, where they are tested, limits. Keys
// past the last one become 0 and are never visible.
template <int kHeadDim, int kKeys, int kThreads>
__device__ inline void copy_keys_async(uint32_t k, uint32_t v, KeyLimits* limits, int thread,
                                       const KeyWalk<kKeys>& walk, const KeyHead& head) {
  using Copy = TileCopy<kHeadDim, kThreads>;
  constexpr int kPasses = kKeys / Copy::kRowsOfPass;
  static_assert(kPasses * Copy::kRowsOfWarp <= kWarpSize);
  // Each lane looks up one of the rows that its warp copies.
  const int lane = thread % kWarpSize;
  const int looked_up =
      Copy::row(thread - lane, lane / Copy::kRowsOfWarp) + lane % Copy::kRowsOfWarp;
  const int32_t place_of_lane = walk.place(walk.number() + looked_up);
  int pass = 0;
  const auto place = [&](int number) {
    return __shfl_sync(~0u, place_of_lane, number * Copy::kRowsOfWarp + lane / Copy::kChunks);
  };
  copy_tile_async<kHeadDim, kKeys, kThreads>(k, thread, head.k, [&](int) {
    const int32_t p = place(pass++);
    return p >= 0 ? head.k + p * head.k_step : nullptr;
  });
  pass = 0;
  copy_tile_async<kHeadDim, kKeys, kThreads>(v, thread, head.v, [&](int) {
    const int32_t p = place(pass++);
    return p >= 0 ? head.v + p * head.v_step : nullptr;
  });
  if (walk.is_full()) return;
  static_assert(kThreads >= kKeys);
  if (thread < kKeys) {
    const int32_t p = walk.place(walk.number() + thread);
    KeyLimits& to = limits[thread];
    if (p < 0) {
      to = {kMaxPosition, -1};
    } else {
      copy_4_async(shared_address(&to.last), head.last + p, true);
      if (head.position) {
        copy_4_async(shared_address(&to.position), head.position + p, true);
      } else {
        to.position = p;
      }
    }
  }
}

// Calls body(m, n, x, is_visible) for every accumulator of scores, rows first_row .. of the tile
// against the keys of `limits`.
template <int kM, int kN, class Body>
__device__ inline void for_visible(const KeyLimits* limits, const int32_t (&position)[kM][2],
                                   int lane, const Body& body) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int4 two = *reinterpret_cast<const int4*>(limits + n * 8 + lane % 4 * 2);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        body(m, n, 2 * half, visible(position[m][half], two.x, two.y));
        body(m, n, 2 * half + 1, visible(position[m][half], two.z, two.w));
      }
    }
  }
}

}  // namespace natslm::kernels::cuda
