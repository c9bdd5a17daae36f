// What the Hopper kernels for short texts have in common: a block owns a tile of queries, lists the
// keys that live for any of them (or, where nearly all do, all up to its last query), and copies
// these rows of K and V, and no others, into tiles of shared memory, some tiles ahead of the
// multiplications.
//
// Blocks are small and several share a multiprocessor: while one lists keys or waits for the first
// of them, others multiply. All waits are block-wide barriers, which every thread of a block passes
// equally often.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>

#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/sm90/attention_short.h"
#include "natslm/kernels/sm90/hopper.cuh"
#include "natslm/kernels/sm90/short_texts.h"
#include "natslm/kernels/sm90/softmax.cuh"
#include "natslm/kernels/sm90/tile_products.cuh"

namespace natslm::kernels::sm90 {

static_assert(kListTile == kTileRows);

// The tile of queries that a block owns.
struct ShortTile {
  int32_t batch, kv_head, first_query, length;
  QuerySpan queries;  // those below the length
};

// A block of the grid of short_grid. Made of the block's numbers alone, so that all of it is the
// same in all threads and needs no division.
__device__ inline ShortTile short_tile(const ShortArguments& a) {
  const auto head = static_cast<int32_t>(blockIdx.z * a.heads_together + blockIdx.x);
  ShortTile tile;
  tile.batch = a.batch_of_head(head);
  tile.kv_head = head - tile.batch * a.kv_heads;
  tile.first_query = (a.tiles - 1 - static_cast<int32_t>(blockIdx.y)) * a.tile_queries;
  tile.length = tile.batch >= a.batch ? 0 : a.lengths ? a.lengths[tile.batch] : a.tokens;
  tile.queries = {tile.first_query, min(tile.first_query + a.tile_queries, tile.length) - 1};
  return tile;
}
// The grid's last heads may not be there.
__device__ inline bool is_there(const ShortArguments& a, const ShortTile& tile) {
  return tile.batch < a.batch;
}

__device__ inline const int32_t* lasts_of(const ShortArguments& a, const ShortTile& tile) {
  return a.last + (int64_t{tile.batch} * a.kv_heads + tile.kv_head) * a.tokens;
}

// Finds the living keys: each warp looks at consecutive ones, 32 a round. `last` is asked for when
// it is made, so that other loads can be started before it is there.
template <int kWarps>
struct KeyScan {
  static constexpr int kMostRounds = list_rounds(kShortTokens, kWarps);
  int32_t rounds, first;
  int32_t last[kMostRounds];  // -1: no key of the list, like all that lives for an earlier query

  __device__ KeyScan(const ShortArguments& a, const ShortTile& tile) {
    const int32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    const int32_t keys = keys_up_to(tile.queries);
    rounds = list_rounds(keys, kWarps);
    first = warp * rounds * kWarpThreads + lane;
    const int32_t* from = lasts_of(a, tile) + first;
#pragma unroll
    for (int i = 0; i < kMostRounds; ++i) {
      const int32_t step = i * kWarpThreads;
      last[i] = i < rounds && first + step < keys ? from[step] : -1;
    }
  }

  // Lists them in ascending order, filled up to whole tiles; returns their number. All threads of
  // the block; the list may be read at once.
  __device__ int32_t list_keys(const QuerySpan& queries, ListedKey* list,
                               int32_t (&found)[kWarps]) const {
    const int32_t warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    int32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kMostRounds; ++i) {
      if (i >= rounds) break;
      mine += __popc(__ballot_sync(~0u, is_listed(queries, last[i])));
    }
    if (lane == 0) found[warp] = mine;
    __syncthreads();
    int32_t place = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) place = all;
      all += found[w];
    }
#pragma unroll
    for (int i = 0; i < kMostRounds; ++i) {
      if (i >= rounds) break;
      const bool listed = is_listed(queries, last[i]);
      const uint32_t lanes = __ballot_sync(~0u, listed);
      if (listed) {
        list[place + __popc(lanes & ((1u << lane) - 1))] =
            listed_key(first + i * kWarpThreads, last[i]);
      }
      place += __popc(lanes);
    }
    const int32_t padded = (all + kListTile - 1) / kListTile * kListTile;
    const int32_t pad = all + static_cast<int32_t>(threadIdx.x);
    if (pad < padded) list[pad] = kNoListedKey;
    __syncthreads();
    return all;
  }
};

// A tile of listed keys.
template <int kHeadDim>
struct ListStage {
  TileHalf k[kHeadDim / kSwizzleColumns], v[kHeadDim / kSwizzleColumns];
};

// A thread's part in the copies of rows [D]: one chunk of every kRowsOfPass-th row.
template <int kHeadDim, int kThreads>
struct RowCopy {
  static constexpr int kChunks = kHeadDim / 8, kRowsOfPass = kThreads / kChunks;
  static constexpr int kPasses = kTileRows / kRowsOfPass;
  static_assert(kRowsOfPass % 8 == 0 && kTileRows % kRowsOfPass == 0);

  int32_t chunk, row, offset;  // offset: chunk_offset of the first pass

  __device__ explicit RowCopy(int32_t thread)
      : chunk(thread % kChunks), row(thread / kChunks), offset(chunk_offset(row, chunk)) {}
  // Rows that are a multiple of 8 apart are swizzled alike.
  __device__ int32_t row_of(int pass) const { return row + pass * kRowsOfPass; }
  __device__ int32_t offset_of(int pass) const {
    return offset + pass * kRowsOfPass * static_cast<int32_t>(sizeof(TileHalf) / kTileRows);
  }
};

// Copies tiles of keys, by all threads. What fills up the last tile is copies of a key that is
// there: no query reads it, and its numbers are as good as any.
template <int kHeadDim, int kThreads>
struct KeyRows {
  using Copy = RowCopy<kHeadDim, kThreads>;
  const Copy copy{static_cast<int32_t>(threadIdx.x)};
  const char *k, *v;        // this thread's chunk of the head's first row
  uint32_t k_step, v_step;  // bytes from key to key
  uint32_t last_key;        // position of the last one that may be read

  __device__ KeyRows(const ShortArguments& a, const ShortTile& tile)
      : k(chunk_in(a.k, a.k_stride, tile)),
        v(chunk_in(a.v, a.v_stride, tile)),
        k_step(static_cast<uint32_t>(a.k_stride.token * 2)),
        v_step(static_cast<uint32_t>(a.v_stride.token * 2)),
        last_key(static_cast<uint32_t>(tile.queries.q1)) {}

  __device__ const char* chunk_in(const __nv_bfloat16* array, const Strides& stride,
                                  const ShortTile& tile) const {
    return reinterpret_cast<const char*>(array + tile.batch * stride.batch +
                                         tile.kv_head * stride.head + copy.chunk * 8);
  }

  // position_of(row): of the key in a row of the tile, or anything larger than all.
  template <class PositionOf>
  __device__ void start(ListStage<kHeadDim>& to, const PositionOf& position_of) const {
    const uint32_t to_k = shared_address(&to.k), to_v = shared_address(&to.v);
#pragma unroll
    for (int pass = 0; pass < Copy::kPasses; ++pass) {
      const uint32_t position = min(position_of(copy.row_of(pass)), last_key);
      copy_async(to_k + copy.offset_of(pass), k + uint64_t{position} * k_step);
      copy_async(to_v + copy.offset_of(pass), v + uint64_t{position} * v_step);
    }
  }
};

// The keys of a list that is there.
template <int kHeadDim, int kThreads>
struct ListedRows : KeyRows<kHeadDim, kThreads> {
  const ListedKey* list;
  __device__ ListedRows(const ShortArguments& a, const ShortTile& tile, const ListedKey* keys)
      : KeyRows<kHeadDim, kThreads>(a, tile), list(keys) {}
  __device__ void start_tile(ListStage<kHeadDim>& to, int32_t tile) const {
    this->start(to,
                [&](int32_t row) -> uint32_t { return position_of(list[tile * kListTile + row]); });
  }
};

// How the queries of a warpgroup stand to the keys of a tile, a bit a key; the same in all lanes.
struct TileReading {
  uint32_t live[2], full[2];
  bool behind;  // no key stands after a query: only `last` can hide one
  __device__ bool is_dead() const { return (live[0] | live[1]) == 0; }
};
__device__ inline TileReading reading_of_tile(const QuerySpan& queries, const ListedKey* keys) {
  TileReading reading;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Tile one = reading_of(queries, keys[half * kWarpThreads + threadIdx.x % kWarpThreads]);
    reading.live[half] = __ballot_sync(~0u, one != Tile::kDead);
    reading.full[half] = __ballot_sync(~0u, one == Tile::kFull);
  }
  reading.behind = position_of(keys[kListTile - 1]) <= queries.q0;
  return reading;
}

// Scores of pairs that are not visible become -inf. `queries`: positions of the thread's two rows.
template <class IsVisible>
__device__ inline void hide_unless(PairRegisters& scores, const TileReading& reading,
                                   const ListedKey* keys, const IsVisible& is_visible) {
  const int32_t column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int block = 0; block < kListTile / 8; ++block) {
    if ((reading.full[block / 4] >> block % 4 * 8 & 0xff) == 0xff) continue;
    const uint2 two = *reinterpret_cast<const uint2*>(&keys[8 * block + column]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float* pair = scores + 4 * block + 2 * row;
      if (!is_visible(row, two.x)) pair[0] = -INFINITY;
      if (!is_visible(row, two.y)) pair[1] = -INFINITY;
    }
  }
}
__device__ inline void hide(PairRegisters& scores, const TileReading& reading,
                            const ListedKey* keys, const int32_t (&queries)[2]) {
  if (reading.behind) {
    const ListedKey until[2] = {least_key_for(queries[0]), least_key_for(queries[1])};
    hide_unless(scores, reading, keys, [&](int row, ListedKey key) { return key >= until[row]; });
  } else {
    hide_unless(scores, reading, keys, [&](int row, ListedKey key) {
      return visible(queries[row], position_of(key), last_of(key));
    });
  }
}

// The two rows of queries, 8 apart, that a thread works on.
struct TwoRows {
  int32_t position[2], head[2];  // head: in the group
  bool exists[2];                // a query below T

  __device__ TwoRows(const ShortArguments& a, const ShortTile& tile) {
    const cuda::PackedRows& rows = a.packed;
    const int32_t thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = thread / kWarpThreads * 16 + thread % kWarpThreads / 4 + 8 * i;
      const int32_t offset = rows.position(row);
      position[i] = tile.first_query + offset;
      head[i] = rows.head(row);
      exists[i] = offset < a.tile_queries && position[i] < a.tokens;
    }
  }
};

// Of row i of a thread, in an array [B, Hq, T, D].
template <class Element>
__device__ inline Element* row_in(Element* array, const Strides& stride, const ShortArguments& a,
                                  const ShortTile& tile, const TwoRows& rows, int i) {
  return array + tile.batch * stride.batch + (tile.kv_head * a.group + rows.head[i]) * stride.head +
         rows.position[i] * stride.token;
}
// Likewise in an array whose rows, one for each of [B, Hq], are `stride` apart.
__device__ inline int64_t index_in(int64_t stride, const ShortArguments& a, const ShortTile& tile,
                                   const TwoRows& rows, int i) {
  return ((int64_t{tile.batch} * a.kv_heads + tile.kv_head) * a.group + rows.head[i]) * stride +
         rows.position[i];
}

// The copies of the first tiles of `keys`, into all stages; for_key_tiles goes on from there.
template <int kStages, class Rows, class Stage>
__device__ inline void start_first_tiles(const Rows& rows, Stage (&stages)[kStages], int32_t keys) {
#pragma unroll
  for (int t = 0; t < kStages; ++t) {
    if (t * kListTile < keys) rows.start_tile(stages[t], t);
    copy_async_commit();
  }
}

// Calls body(stage, keys of the tile) for each tile of the list, in order. Copies were started by
// start_first_tiles and stay kStages - 1 tiles ahead. The multiplications of a body may still run
// when it returns; it must wait for those of the call before in `settle`, which is called before
// the stage they read is overwritten, and once at the end.
template <int kStages, class Rows, class Stage, class Body, class Settle>
__device__ inline void for_key_tiles(const Rows& rows, Stage (&stages)[kStages],
                                     const ListedKey* list, int32_t keys, const Body& body,
                                     const Settle& settle) {
  static_assert((kStages & (kStages - 1)) == 0, "a stage is found by masking");
  const int32_t tiles = (keys + kListTile - 1) / kListTile;
  for (int32_t t = 0; t < tiles; ++t) {
    // A group of copies a tile; those of kStages tiles were started before the first, one more
    // after each.
    if (t == 0) {
      copy_async_wait<kStages - 1>();
    } else {
      copy_async_wait<kStages - 2>();
    }
    fence_async_proxy();
    settle();
    __syncthreads();  // the tile is there; nobody reads the one before
    if (t > 0) {
      const int32_t ahead = t + kStages - 1;
      if (ahead < tiles) rows.start_tile(stages[ahead % kStages], ahead);
      copy_async_commit();
    }
    body(stages[t % kStages], list + t * kListTile);
  }
  copy_async_wait<0>();  // a block must not end before its copies, were there no tile
  settle();
}

// A block for each query tile of each head: the longest tiles first, and of each tile as many heads
// as start together.
inline dim3 short_grid(const ShortArguments& a) {
  const int32_t heads = a.batch * a.kv_heads;
  return dim3(static_cast<unsigned>(a.heads_together), static_cast<unsigned>(a.tiles),
              static_cast<unsigned>((heads + a.heads_together - 1) / a.heads_together));
}

// Before a launch: so much shared memory, and room for as many blocks as their size allows.
template <class Kernel>
void let_blocks_share(Kernel kernel, size_t shared_bytes) {
  NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
  NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared));
}

}  // namespace natslm::kernels::sm90
