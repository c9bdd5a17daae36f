// Gradients of keys and values, and, in position order, the role sums in the same pass.
//
// Two warps share 32 keys, because one has no registers for two gradients of 32 keys: the *weight
// warp* computes scores and probabilities and gathers dv; the *difference warp* computes dout . v,
// takes the probabilities from shared memory and gathers dk and the role sums. Each pair meets once
// a tile at its named barrier: the weight warp arrives, the difference warp waits.
//
// Of heads of 256 channels a warp has registers for the gradient of half of them, so that two pairs
// share the 32 keys, each with one half: both compute scores and differences, the first one has the
// probabilities and the role sums to itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/key_parallel.cuh"

namespace natslm::kernels::cuda {

template <int kHeadDim>
struct KeyGradientConfig {
  static constexpr int kHalves = kHeadDim <= 128 ? 1 : 2;  // of the channels, a pair each
  static constexpr int kChannels = kHeadDim / kHalves;
  static constexpr int kPairs = kHeadDim == 64 || kHalves == 2 ? 2 : 4;  // of the first half
  static constexpr int kThreads = 2 * kHalves * kPairs * kWarpSize, kKeys = kPairs * kKeysOfWarp;
  static constexpr int kStages = 2;
  static constexpr int kBlocksPerSm = kHeadDim == 64 ? 3 : 1;
  // Queries whose scores are in registers at a time.
  static constexpr int kStep = 32;
  static constexpr int kSteps = kQueriesOfTile<kHeadDim> / kStep, kN = kStep / 8;
  static_assert(kPairs * kSteps < 16);  // named barriers
  // Who is at one: the warp with the probabilities, and all who take them.
  static constexpr int kAtBarrier = (1 + kHalves) * kWarpSize;

  struct Shared {
    alignas(kTileAlignment<kHeadDim>) uint8_t k[kKeys * kRowBytes<kHeadDim>];  // at the end, dk
    alignas(kTileAlignment<kHeadDim>) uint8_t v[kKeys * kRowBytes<kHeadDim>];  // at the end, dv
    QueryStage<kHeadDim> stage[kStages];
    // exp(s - lse) of a pair's tile, as the accumulators of its lanes.
    alignas(16) float4 factor[kPairs][kSteps][2][kN][kWarpSize];
    KeyTable<kKeys> table;
    KeyBlock block;
    QueryRange range;
    KeyBounds bounds[kPairs];
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

// A step of a warp pair: kStep queries of a tile in shared memory against its 32 keys.
struct PairStep {
  int half;         // of the channels
  int first_key;    // of the block's
  int first_row;    // of the tile's
  int32_t query;    // position of the first row
  Tile visibility;  // of the tile
  Reach reach;      // likewise
  int barrier;
};

// Clears what no query may read. (Not by a product with 0: the factor of a hidden pair may be
// infinite.)
template <int kN, int kKeys>
__device__ inline void hide(float (&of)[2][kN][4], const KeyTable<kKeys>& table,
                            const PairStep& now, int lane) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = now.first_key + m * 16 + half * 8 + lane / 4;
      const int32_t position = table.position[key], last = table.last[key];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int32_t i = now.query + n * 8 + lane % 4 * 2 + x;
          float& value = of[m][n][2 * half + x];
          value = visible(i, position, last) ? value : 0;
        }
      }
    }
  }
}

// The weight warp's part: dv += P^T dout.
template <int kHeadDim, int kD, int kN, int kKeys>
__device__ inline void gather_dv(float (&dv)[2][kD][4], uint32_t k,
                                 const QueryStage<kHeadDim>& tile, float4 (*factor)[kN][kWarpSize],
                                 const KeyTable<kKeys>& table, const PairStep& now, int lane,
                                 float scale) {
  float weight[2][kN][4];
  clear(weight);
  const uint32_t rows = now.first_row * kRowBytes<kHeadDim>;
  multiply_channels<kHeadDim>(weight, k,
                              shared_address(tile.q) + rows + by_columns<kHeadDim>(lane));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int column = now.first_row + n * 8 + lane % 4 * 2;
    const float2 lse = *reinterpret_cast<const float2*>(&tile.lse[column]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        weight[m][n][x] = probability(weight[m][n][x], scale, x % 2 ? lse.y : lse.x);
      }
      if (now.half == 0) {
        factor[m][n][lane] =
            make_float4(weight[m][n][0], weight[m][n][1], weight[m][n][2], weight[m][n][3]);
      }
    }
  }
  if (now.half == 0) arrive_at_barrier(now.barrier, KeyGradientConfig<kHeadDim>::kAtBarrier);
  if (now.visibility == Tile::kDead) return;
  if (now.visibility == Tile::kPartial) hide(weight, table, now, lane);
  multiply_weights<kHeadDim>(
      dv, weight,
      (shared_address(tile.dout) + rows + by_rows<kHeadDim>(lane)) ^ (now.half * 16 * kD));
}

// The difference warp's part: dk += dS^T q, and the role sums.
template <int kHeadDim, int kD, int kN, int kKeys>
__device__ inline void gather_dk(float (&dk)[2][kD][4], HorizonSums& sums, uint32_t v,
                                 const QueryStage<kHeadDim>& tile,
                                 const float4 (*factor)[kN][kWarpSize],
                                 const KeyTable<kKeys>& table, const PairStep& now, int lane,
                                 float limit, int32_t horizon_count) {
  float ds[2][kN][4];
  clear(ds);
  const uint32_t rows = now.first_row * kRowBytes<kHeadDim>;
  multiply_channels<kHeadDim>(ds, v, shared_address(tile.dout) + rows + by_columns<kHeadDim>(lane));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int column = now.first_row + n * 8 + lane % 4 * 2;
    const float2 delta = *reinterpret_cast<const float2*>(&tile.delta[column]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int x = 0; x < 4; ++x) ds[m][n][x] -= x % 2 ? delta.y : delta.x;
    }
  }
  wait_at_barrier(now.barrier, KeyGradientConfig<kHeadDim>::kAtBarrier);
  if (now.reach != Reach::kNone && now.half == 0) {
    constexpr int kPart = 4;  // columns of accumulators at a time: registers are scarce
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int part = 0; part < kN; part += kPart) {
        float g[kPart][4];
#pragma unroll
        for (int n = 0; n < kPart; ++n) {
          const float4 f = factor[m][part + n][lane];
          g[n][0] = fminf(f.x, limit) * ds[m][part + n][0];
          g[n][1] = fminf(f.y, limit) * ds[m][part + n][1];
          g[n][2] = fminf(f.z, limit) * ds[m][part + n][2];
          g[n][3] = fminf(f.w, limit) * ds[m][part + n][3];
        }
        const int32_t query = now.query + part * 8;
        if (now.reach == Reach::kCut) {
          add_to_sums<true>(sums, g, m, table, now.first_key, lane, horizon_count, query);
        } else {
          add_to_sums<false>(sums, g, m, table, now.first_key, lane, horizon_count, query);
        }
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
  }
  if (now.visibility == Tile::kPartial) hide(ds, table, now, lane);
  multiply_weights<kHeadDim>(
      dk, ds, (shared_address(tile.q) + rows + by_rows<kHeadDim>(lane)) ^ (now.half * 16 * kD));
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
template <int kHeadDim, int kD, int kKeys>
__device__ inline void write_gradient(BFloat16* to, const Strides& stride, uint8_t* tile,
                                      const float (&gradient)[2][kD][4],
                                      const KeyTable<kKeys>& table, const KeyBlock& block, int half,
                                      int first_key, int lane) {
  store_tile<kHeadDim>(tile, first_key, lane, gradient, half * kD);
  __syncwarp();
  constexpr int kChunks = kD;  // of 8 channels
  BFloat16* base = to + block.batch * stride.batch + block.kv_head * stride.head;
#pragma unroll
  for (int i = 0; i < kKeysOfWarp; i += kWarpSize / kChunks) {
    const int key = first_key + i + lane / kChunks, chunk = half * kChunks + lane % kChunks;
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
  constexpr int kQueries = kQueriesOfTile<kHeadDim>;
  auto& shared = *reinterpret_cast<typename Config::Shared*>(block_memory());
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  // Warps w and w + 4 run on the same part of an SM: give each part both kinds.
  const int pair = warp % Config::kPairs;
  const int role = warp / Config::kPairs;  // weight, difference; of two halves difference, weight
  const bool weighs = Config::kHalves == 1 ? warp < Config::kPairs : role == 0 || role == 3;
  const int half = Config::kHalves == 1 ? 0 : role % 2;
  const int first_key = pair * kKeysOfWarp;

  const KeyBlock block = key_block(a.keys, a.spans, a.heads_together, Config::kKeys);
  if (block.span.past_length) return write_no_gradient<kHeadDim, Config::kThreads>(a, block);

  const auto copy_span = [&](uint8_t* to, const BFloat16* from, const Strides& stride,
                             int32_t step) {
    copy_span_async<kHeadDim, Config::kKeys, Config::kThreads>(to, thread, from, stride, step,
                                                               block);
  };
  copy_span(shared.k, a.keys.k, a.keys.k_stride, a.keys.k_step);
  copy_span(shared.v, a.keys.v, a.keys.v_stride, a.keys.v_step);
  shared.table.fill(a.keys, block, a.horizons, a.horizon_count, thread, Config::kThreads);
  __syncthreads();
  const KeyBounds mine = shared.table.template bounds<1>(first_key, lane, a.horizon_count);
  if (lane == 0 && weighs && half == 0) shared.bounds[pair] = mine;
  const KeyBounds all =
      shared.table.template bounds<Config::kKeys / kWarpSize>(0, lane, a.horizon_count);
  if (thread == 0) {
    shared.range =
        query_range<kQueries>(all.first, min(max(all.max_last, all.max_horizon), block.length - 1));
    shared.block = block;
  }
  __syncthreads();

  QueryWalk<kQueries> walk(shared.range);
  const auto copy_queries = [&](int stage) {
    copy_query_tile_async<kHeadDim, Config::kThreads>(shared.stage[stage], thread, a.queries,
                                                      shared.block, walk, a.keys.tokens);
  };
  if (!walk.done(shared.range, a.queries.group)) copy_queries(0);

  const uint32_t rows = first_key * kRowBytes<kHeadDim> + by_rows<kHeadDim>(lane);
  const uint32_t my_keys = shared_address(weighs ? shared.k : shared.v) + rows;
  float gradient[2][Config::kChannels / 8][4];
  clear(gradient);
  HorizonSums sums;
  for (int stage = 0; !walk.done(shared.range, a.queries.group); stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // this tile is there, and nobody reads the last one or its factors any more
    const int32_t q0 = walk.position();
    walk.next(shared.range);
    if (!walk.done(shared.range, a.queries.group)) copy_queries(stage ^ 1);

    const KeyBounds& keys = shared.bounds[pair];
    PairStep now;
    now.half = half;
    now.first_key = first_key;
    now.visibility =
        classify(q0, q0 + kQueries - 1, keys.first, keys.last, keys.min_last, keys.max_last);
    now.reach = reach_of<kQueries>(shared.table, keys, first_key, lane, a.horizon_count, q0);
    // All warps of a pair see the same keys and decide alike, so their barriers are matched.
    if (now.visibility == Tile::kDead && now.reach == Reach::kNone) continue;
#pragma unroll 1
    for (int step = 0; step < Config::kSteps; ++step) {
      now.first_row = step * Config::kStep;
      now.query = q0 + now.first_row;
      now.barrier = 1 + pair * Config::kSteps + step;
      if (weighs) {
        gather_dv<kHeadDim>(gradient, my_keys, shared.stage[stage], shared.factor[pair][step],
                            shared.table, now, lane, a.scale);
      } else {
        gather_dk<kHeadDim>(gradient, sums, my_keys, shared.stage[stage], shared.factor[pair][step],
                            shared.table, now, lane, a.limit, a.horizon_count);
      }
    }
  }

  wait_for_copies();  // of the keys, if no query reads them
  __syncthreads();    // nobody reads keys and values any more
  if (weighs) {
    write_gradient<kHeadDim>(a.dv, a.dv_stride, shared.v, gradient, shared.table, shared.block,
                             half, first_key, lane);
    return;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int d = 0; d < Config::kChannels / 8; ++d) {
#pragma unroll
      for (int x = 0; x < 4; ++x) gradient[m][d][x] *= a.scale;
    }
  }
  write_gradient<kHeadDim>(a.dk, a.dk_stride, shared.k, gradient, shared.table, shared.block, half,
                           first_key, lane);
  if (half != 0) return;
  sums.write(a.role_sums, shared.table, first_key, lane, a.horizon_count, a.keys,
             shared.block.head);
}

}  // namespace natslm::kernels::cuda
