// Gradients of keys and values, and, in position order, the role sums in the same pass.
//
// Two warps share 32 keys, because one has no registers for two gradients of 32 keys: the *weight
// warp* computes scores and probabilities and gathers dv; the *difference warp* computes dout . v,
// takes the probabilities from shared memory and gathers dk and the role sums. Each pair meets once
// a tile at its named barrier: the weight warp arrives, the difference warp waits.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/key_parallel.cuh"

namespace natslm::kernels::cuda {

template <int kHeadDim>
struct KeyGradientConfig {
  static constexpr int kPairs = kHeadDim == 64 ? 2 : 4;
  static constexpr int kThreads = 2 * kPairs * kWarpSize, kKeys = kPairs * kKeysOfWarp;
  static constexpr int kStages = 2;
  static constexpr int kBlocksPerSm = kHeadDim == 64 ? 3 : 1;
  static constexpr int kN = kQueriesOfTile / 8;

  struct Shared {
    alignas(kTileAlignment) uint8_t k[kKeys * kRowBytes<kHeadDim>];  // at the end, dk
    alignas(kTileAlignment) uint8_t v[kKeys * kRowBytes<kHeadDim>];  // at the end, dv
    QueryStage<kHeadDim> stage[kStages];
    // exp(s - lse) of a pair's tile, as the accumulators of its lanes.
    alignas(16) float4 factor[kPairs][2][kN][kWarpSize];
    KeyTable<kKeys> table;
  };
};

struct KeyGradientArgs {
  KeySource keys;
  QuerySource queries;
  int32_t spans, heads_together;
  float scale;
  float limit;              // of exp(s - lse) in role sums: 1, or infinity
  int32_t horizon_count;    // 0: no role sums
  const int32_t* horizons;  // [horizon_count, B, Hkv, T]
  float* role_sums;         // likewise
  BFloat16 *dk, *dv;        // [B, Hkv, T, D]
  Strides dk_stride, dv_stride;
};

// What a warp needs to know to go through a tile.
struct PairTile {
  int32_t q0;
  Tile visibility;
  Reach reach;
  __device__ bool idle() const { return visibility == Tile::kDead && reach == Reach::kNone; }
};

// Calls body(n, x, half, is_visible) for the accumulators of row fragment m.
template <int kN, int kKeys, class Body>
__device__ inline void for_pairs(const KeyTable<kKeys>& table, int first_key, int m, int lane,
                                 int32_t q0, bool test, const Body& body) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + m * 16 + half * 8 + lane / 4;
    const int32_t position = table.position[key], last = table.last[key];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int32_t i = q0 + n * 8 + lane % 4 * 2 + x;
        body(n, 2 * half + x, !test || visible(i, position, last));
      }
    }
  }
}

// The weight warp's part of a tile.
template <int kHeadDim, int kKeys>
__device__ inline void gather_dv(float (&dv)[2][kHeadDim / 8][4], uint32_t k,
                                 const QueryStage<kHeadDim>& tile,
                                 float4 (&factor)[2][8][kWarpSize], const KeyTable<kKeys>& table,
                                 int first_key, int lane, const PairTile& now, float scale,
                                 int barrier) {
  constexpr int kN = kQueriesOfTile / 8;
  float weight[2][kN][4];
  clear(weight);
  multiply_channels<kHeadDim>(weight, k, shared_address(tile.q) + by_columns<kHeadDim>(lane));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(&tile.lse[n * 8 + lane % 4 * 2]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        weight[m][n][x] = probability(weight[m][n][x], scale, x % 2 ? lse.y : lse.x);
      }
      factor[m][n][lane] =
          make_float4(weight[m][n][0], weight[m][n][1], weight[m][n][2], weight[m][n][3]);
    }
  }
  arrive_at_barrier(barrier, 2 * kWarpSize);
  if (now.visibility == Tile::kDead) return;
  if (now.visibility == Tile::kPartial) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      for_pairs<kN>(table, first_key, m, lane, now.q0, true, [&](int n, int x, bool is_visible) {
        weight[m][n][x] = is_visible ? weight[m][n][x] : 0;
      });
    }
  }
  multiply_weights<kHeadDim>(dv, weight, shared_address(tile.dout) + by_rows<kHeadDim>(lane));
}

// The difference warp's part of a tile.
template <int kHeadDim, int kKeys>
__device__ inline void gather_dk(float (&dk)[2][kHeadDim / 8][4], HorizonSums& sums, uint32_t v,
                                 const QueryStage<kHeadDim>& tile,
                                 const float4 (&factor)[2][8][kWarpSize],
                                 const KeyTable<kKeys>& table, int first_key, int lane,
                                 const PairTile& now, const KeyGradientArgs& a, int barrier) {
  constexpr int kN = kQueriesOfTile / 8;
  float ds[2][kN][4];
  clear(ds);
  multiply_channels<kHeadDim>(ds, v, shared_address(tile.dout) + by_columns<kHeadDim>(lane));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 delta = *reinterpret_cast<const float2*>(&tile.delta[n * 8 + lane % 4 * 2]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) ds[m][n][x] -= x % 2 ? delta.y : delta.x;
    }
  }
  wait_at_barrier(barrier, 2 * kWarpSize);
  if (now.reach != Reach::kNone) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float g[kN][4];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float4 f = factor[m][n][lane];
        g[n][0] = fminf(f.x, a.limit) * ds[m][n][0];
        g[n][1] = fminf(f.y, a.limit) * ds[m][n][1];
        g[n][2] = fminf(f.z, a.limit) * ds[m][n][2];
        g[n][3] = fminf(f.w, a.limit) * ds[m][n][3];
      }
      if (now.reach == Reach::kCut) {
        add_to_sums<true>(sums, g, m, table, first_key, lane, a.horizon_count, now.q0);
      } else {
        add_to_sums<false>(sums, g, m, table, first_key, lane, a.horizon_count, now.q0);
      }
    }
  }
  if (now.visibility == Tile::kDead) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float4 f = factor[m][n][lane];
      ds[m][n][0] *= f.x;
      ds[m][n][1] *= f.y;
      ds[m][n][2] *= f.z;
      ds[m][n][3] *= f.w;
    }
    if (now.visibility == Tile::kPartial) {
      // Not a product with 0: the factor of a hidden pair may be infinite.
      for_pairs<kN>(table, first_key, m, lane, now.q0, true, [&](int n, int x, bool is_visible) {
        ds[m][n][x] = is_visible ? ds[m][n][x] : 0;
      });
    }
  }
  multiply_weights<kHeadDim>(dk, ds, shared_address(tile.q) + by_rows<kHeadDim>(lane));
}

// Zeros for the keys past a length.
template <int kHeadDim, int kThreads>
__device__ inline void write_no_gradient(const KeyGradientArgs& a, const KeyBlock& block) {
  constexpr int kChunks = kHeadDim / 8;
  const int keys = block.span.end - block.span.begin;
  for (int i = threadIdx.x; i < keys * kChunks; i += kThreads) {
    const int32_t j = block.span.begin + i / kChunks;
    const auto zero = [&](BFloat16* to, const Strides& stride) {
      BFloat16* row =
          to + block.batch * stride.batch + block.kv_head * stride.head + j * stride.token;
      reinterpret_cast<uint4*>(row)[i % kChunks] = uint4{};
    };
    zero(a.dk, a.dk_stride);
    zero(a.dv, a.dv_stride);
  }
  const int64_t plane = int64_t{a.keys.batch} * a.keys.kv_heads * a.keys.tokens;
  for (int i = threadIdx.x; i < keys * a.horizon_count; i += kThreads) {
    a.role_sums[i / keys * plane + block.head * a.keys.tokens + block.span.begin + i % keys] = 0;
  }
}

// Rounds a warp's gradient of 32 keys and writes it to the keys' positions by way of `tile`.
template <int kHeadDim, int kKeys>
__device__ inline void write_gradient(BFloat16* to, const Strides& stride, uint8_t* tile,
                                      const float (&gradient)[2][kHeadDim / 8][4],
                                      const KeyTable<kKeys>& table, const KeyBlock& block,
                                      int first_key, int lane) {
  store_tile<kHeadDim>(tile, first_key, lane, gradient);
  __syncwarp();
  constexpr int kChunks = kHeadDim / 8;
  BFloat16* base = to + block.batch * stride.batch + block.kv_head * stride.head;
#pragma unroll
  for (int i = 0; i < kKeysOfWarp; i += kWarpSize / kChunks) {
    const int key = first_key + i + lane / kChunks, chunk = lane % kChunks;
    const int32_t position = table.position[key];
    if (position == KeyTable<kKeys>::kNone) continue;
    reinterpret_cast<uint4*>(base + position * stride.token)[chunk] =
        *reinterpret_cast<const uint4*>(tile + tile_offset<kHeadDim>(key, chunk));
  }
}

template <int kHeadDim>
__global__ __launch_bounds__(
    KeyGradientConfig<kHeadDim>::kThreads,
    KeyGradientConfig<kHeadDim>::kBlocksPerSm) void key_gradient_kernel(const __grid_constant__
                                                                            KeyGradientArgs a) {
  using Config = KeyGradientConfig<kHeadDim>;
  auto& shared = *reinterpret_cast<typename Config::Shared*>(block_memory());
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  // Warps w and w + 4 run on the same part of an SM: give each part both kinds.
  const int pair = warp % Config::kPairs;
  const bool weighs = warp < Config::kPairs;
  const int first_key = pair * kKeysOfWarp;

  const KeyBlock block = key_block(a.keys, a.spans, a.heads_together, Config::kKeys);
  if (block.span.past_length) return write_no_gradient<kHeadDim, Config::kThreads>(a, block);

  const KeyHead head = key_head(a.keys, block.batch, block.kv_head);
  const auto copy_span = [&](uint8_t* to, const BFloat16* from, int64_t step) {
    copy_tile_async<kHeadDim, Config::kKeys, Config::kThreads>(
        shared_address(to), thread, from, [&](int row) {
          const int32_t place = block.span.begin + row;
          return place < block.span.end ? from + place * step : nullptr;
        });
  };
  copy_span(shared.k, head.k, head.k_step);
  copy_span(shared.v, head.v, head.v_step);
  shared.table.fill(a.keys, block, a.horizons, a.horizon_count, thread, Config::kThreads);
  __syncthreads();
  const KeyBounds mine = shared.table.template bounds<1>(first_key, lane, a.horizon_count);
  const KeyBounds all =
      shared.table.template bounds<Config::kKeys / kWarpSize>(0, lane, a.horizon_count);

  const int32_t last_query = min(max(all.max_last, all.max_horizon), block.length - 1);
  QueryWalk walk(all.first, last_query, a.queries.group);
  const auto copy_queries = [&](int stage) {
    copy_query_tile_async<kHeadDim, Config::kThreads>(shared.stage[stage], thread, a.queries, block,
                                                      walk, a.keys.tokens);
  };
  if (!walk.done()) copy_queries(0);

  const uint32_t rows = first_key * kRowBytes<kHeadDim> + by_rows<kHeadDim>(lane);
  const uint32_t my_keys = shared_address(weighs ? shared.k : shared.v) + rows;
  float gradient[2][kHeadDim / 8][4];
  clear(gradient);
  HorizonSums sums;
  for (int stage = 0; !walk.done(); stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // this tile is there, and nobody reads the last one or its factors any more
    PairTile now;
    now.q0 = walk.position();
    walk.next();
    if (!walk.done()) copy_queries(stage ^ 1);

    now.visibility = classify(now.q0, now.q0 + kQueriesOfTile - 1, mine.first, mine.last,
                              mine.min_last, mine.max_last);
    now.reach = reach_of(shared.table, mine, first_key, lane, a.horizon_count, now.q0);
    // Both warps of a pair see the same keys and decide alike, so their barrier is matched.
    if (now.idle()) continue;
    if (weighs) {
      gather_dv<kHeadDim>(gradient, my_keys, shared.stage[stage], shared.factor[pair], shared.table,
                          first_key, lane, now, a.scale, 1 + pair);
    } else {
      gather_dk<kHeadDim>(gradient, sums, my_keys, shared.stage[stage], shared.factor[pair],
                          shared.table, first_key, lane, now, a, 1 + pair);
    }
  }

  wait_for_copies();  // of the keys, if no query reads them
  __syncthreads();    // nobody reads keys and values any more
  if (weighs) {
    write_gradient<kHeadDim>(a.dv, a.dv_stride, shared.v, gradient, shared.table, block, first_key,
                             lane);
    return;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
      for (int x = 0; x < 4; ++x) gradient[m][d][x] *= a.scale;
    }
  }
  write_gradient<kHeadDim>(a.dk, a.dk_stride, shared.k, gradient, shared.table, block, first_key,
                           lane);
  sums.write(a.role_sums, shared.table, first_key, lane, a.horizon_count, a.keys, block.head);
}

}  // namespace natslm::kernels::cuda
