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
  int32_t q_step, dout_step;  // bytes from token to token
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

// What a block needs again and again while it walks over keys. In shared memory, because the
// accumulators leave no registers for it.
struct TileKeys {
  const BFloat16 *k, *v;    // place 0 of the (sequence, KV head)
  const int32_t* last;      // by place
  const int32_t* position;  // by place; null: the place itself
  const int32_t* min_last;  // position order: of kBoundKeys keys each; null in sorted order
  const int32_t* max_last;  // likewise
  int32_t first_query, last_query;
  KeyPieces pieces;
};

__device__ inline TileKeys tile_keys(const KeyPlan& plan, const QueryTile& tile) {
  const KeySource& keys = plan.keys;
  const int64_t row = tile.head * tile.tokens;
  TileKeys to;
  to.k = keys.k + tile.batch * keys.k_stride.batch + tile.kv_head * keys.k_stride.head;
  to.v = keys.v + tile.batch * keys.v_stride.batch + tile.kv_head * keys.v_stride.head;
  to.last = keys.last + row;
  to.first_query = tile.first;
  to.last_query = tile.last();
  if (plan.runs) {
    const int32_t number = tile.first / plan.tile_queries;
    to.position = keys.position + row;
    to.min_last = to.max_last = nullptr;
    to.pieces = pieces_of(plan.runs + (tile.head * plan.tiles + number) * KeyOrder::kSegments);
  } else {
    const int64_t bounds = tile.head * ((tile.tokens + kBoundKeys - 1) / kBoundKeys);
    to.position = nullptr;
    to.min_last = plan.min_last + bounds;
    to.max_last = plan.max_last + bounds;
    to.pieces = whole_piece(tile.length);
  }
  return to;
}

// Walks over the tiles of kKeys keys that a query tile reads. All threads walk alike.
template <int kKeys>
class KeyWalk {
 public:
  __device__ explicit KeyWalk(const TileKeys& of) : of_(of) {}

  // Moves on to the next tile, the first one at first; false when there is none.
  __device__ bool next() {
    if (!of_.min_last) {
      number_ += kKeys;
      is_full_ = number_ + kKeys <= of_.pieces.full;
      return number_ < of_.pieces.total();
    }
    while (live_ == 0) {
      window_ += kWarpSize;
      if (window_ * kKeys > of_.last_query) return false;
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
  // Place of a key of the tile; -1 past the last one.
  __device__ int32_t place(int key) const {
    const int32_t number = number_ + key;
    return number < of_.pieces.total() ? place_of(of_.pieces, number) : -1;
  }

 private:
  // Classifies the tiles window_ .. window_ + 31.
  __device__ void look_at_window() {
    const int32_t number = (window_ + static_cast<int32_t>(threadIdx.x) % kWarpSize) * kKeys;
    Tile kind = Tile::kDead;
    if (number <= of_.last_query) {
      kind = classify(of_.first_query, of_.last_query, number, number + kKeys - 1,
                      of_.min_last[number / kBoundKeys], of_.max_last[number / kBoundKeys]);
    }
    live_ = __ballot_sync(~0u, kind != Tile::kDead);
    full_ = __ballot_sync(~0u, kind == Tile::kFull);
  }

  static_assert(kBoundKeys % kKeys == 0);
  const TileKeys& of_;
  int32_t number_ = -kKeys;
  bool is_full_ = false;
  int32_t window_ = -kWarpSize;
  uint32_t live_ = 0, full_ = 0;
};

// Starts the copy of the walk's present tile: keys, values and, where they are tested, limits. Keys
// past the last one become 0 and are never visible. Steps: bytes from place to place.
template <int kHeadDim, int kKeys, int kThreads>
__device__ inline void copy_keys_async(uint32_t k, uint32_t v, KeyLimits* limits, int thread,
                                       const KeyWalk<kKeys>& walk, const TileKeys& keys,
                                       int32_t k_step, int32_t v_step) {
  using Copy = TileCopy<kHeadDim, kThreads>;
  constexpr int kPasses = kKeys / Copy::kRowsOfPass;
  static_assert(kPasses * Copy::kRowsOfWarp <= kWarpSize);
  // Each lane looks up one of the rows that its warp copies.
  const int lane = thread % kWarpSize;
  const int32_t place_of_lane =
      walk.place(Copy::row(thread - lane, lane / Copy::kRowsOfWarp) + lane % Copy::kRowsOfWarp);
  int32_t place[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    place[pass] = __shfl_sync(~0u, place_of_lane, pass * Copy::kRowsOfWarp + lane / Copy::kChunks);
  }
  const auto place_of_row = [&](int, int pass) { return place[pass]; };
  copy_rows_async<kHeadDim, kKeys, kThreads>(k, thread, keys.k, k_step, place_of_row);
  copy_rows_async<kHeadDim, kKeys, kThreads>(v, thread, keys.v, v_step, place_of_row);
  if (walk.is_full()) return;
  static_assert(kThreads >= kKeys);
  if (thread < kKeys) {
    const int32_t place = walk.place(thread);
    KeyLimits& to = limits[thread];
    if (place < 0) {
      to = {kMaxPosition, -1};
    } else {
      copy_4_async(shared_address(&to.last), keys.last + place, true);
      if (keys.position) {
        copy_4_async(shared_address(&to.position), keys.position + place, true);
      } else {
        to.position = place;
      }
    }
  }
}

// Calls body(m, n, x, is_visible) for every accumulator of the scores of a warp's rows against the
// keys of `limits`. row_position: of the warp's first row.
template <int kM, int kN, class Body>
__device__ inline void for_visible(const KeyLimits* limits, const int32_t* row_position, int lane,
                                   const Body& body) {
  int32_t position[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    position[m][0] = row_position[m * 16 + lane / 4];
    position[m][1] = row_position[m * 16 + 8 + lane / 4];
  }
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
