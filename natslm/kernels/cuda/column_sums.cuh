// Sums over queries for every key, without gradients: attention mass, and role sums over all causal
// pairs.
//
//   mass:      sum over i of exp(s_ij - lse_i)                              up to last_j
//   role sums: sum over i of min(exp(s_ij - lse_i), 1) (dout_i . v_j - delta_i)   up to a horizon
//
// A warp keeps its keys and values as A fragments in registers; only queries stream through shared
// memory. Of heads of 256 channels the registers would hold nothing else: there they stay in shared
// memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "natslm/kernels/cuda/key_parallel.cuh"

namespace natslm::kernels::cuda {

template <int kHeadDim>
struct ColumnSumsConfig {
  static constexpr bool kInRegisters = kHeadDim <= 128;
  static constexpr int kWarps = kInRegisters ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarpSize, kKeys = kWarps * kKeysOfWarp;
  static constexpr int kStages = 2;
  static constexpr int kBlocksPerSm = !kInRegisters ? 1 : kHeadDim == 64 ? 3 : 2;
  // Queries whose scores are in registers at a time.
  static constexpr int kStep = 32;

  // What the rows of a warp are to multiply_channels: fragments, or their address.
  using Rows = std::conditional_t<kInRegisters, uint32_t[2][kHeadDim / 16][4], uint32_t>;

  struct KeyTiles {
    alignas(kTileAlignment<kHeadDim>) uint8_t k[kKeys * kRowBytes<kHeadDim>];
    alignas(kTileAlignment<kHeadDim>) uint8_t v[kKeys * kRowBytes<kHeadDim>];
  };
  struct Nothing {};

  struct Shared : std::conditional_t<kInRegisters, Nothing, KeyTiles> {
    QueryStage<kHeadDim> stage[kStages];  // at first keys and values, on their way to registers
    KeyTable<kKeys> table;
    KeyBlock block;
    QueryRange range;
    KeyBounds bounds[kWarps];
  };
  static_assert(!kInRegisters || kKeys == 2 * kQueriesOfTile<kHeadDim>);
};

struct ColumnSumsArgs {
  KeySource keys;
  QuerySource queries;
  int32_t spans, heads_together;
  float scale;
  float limit;  // of exp(s - lse): 1, or infinity
  int32_t horizon_count;
  const int32_t* horizons;  // [horizon_count, B, Hkv, T]
  float* sums;              // likewise
};

// The A fragments of a warp's 32 rows of an array [rows][D] that has been copied to `tile`.
template <int kHeadDim>
__device__ inline void load_fragments(uint32_t (&to)[2][kHeadDim / 16][4], uint32_t rows) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      load_matrices(to[m][d], (rows ^ (d << 5)) + m * 16 * kRowBytes<kHeadDim>);
    }
  }
}

__device__ inline void hold(uint32_t& to, uint32_t rows) {
  to = rows;
}
template <int kSteps>
__device__ inline void hold(uint32_t (&to)[2][kSteps][4], uint32_t rows) {
  load_fragments<16 * kSteps>(to, rows);
}

// kDifference: with the second factor (role sums).
template <int kHeadDim, bool kDifference>
__global__ __launch_bounds__(
    ColumnSumsConfig<kHeadDim>::kThreads,
    ColumnSumsConfig<kHeadDim>::kBlocksPerSm) void column_sums_kernel(const __grid_constant__
                                                                          ColumnSumsArgs a) {
  using Config = ColumnSumsConfig<kHeadDim>;
  constexpr int kStep = Config::kStep, kN = kStep / 8, kQueries = kQueriesOfTile<kHeadDim>;
  auto& shared = *reinterpret_cast<typename Config::Shared*>(block_memory());
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int first_key = thread / kWarpSize * kKeysOfWarp;

  const KeyBlock block = key_block(a.keys, a.spans, a.heads_together, Config::kKeys);
  if (block.span.past_length) {
    const int64_t plane = int64_t{a.keys.batch} * a.keys.kv_heads * a.keys.tokens;
    for (int32_t j = block.span.begin + thread; j < block.span.end; j += Config::kThreads) {
      for (int h = 0; h < a.horizon_count; ++h) {
        a.sums[h * plane + block.head * a.keys.tokens + j] = 0;
      }
    }
    return;
  }

  const auto copy_span = [&](uint8_t* to, const BFloat16* from, const Strides& stride,
                             int32_t step) {
    copy_span_async<kHeadDim, Config::kKeys, Config::kThreads>(to, thread, from, stride, step,
                                                               block);
  };
  // A stage's q and dout lie side by side and hold a span of keys.
  uint8_t *k_tile = shared.stage[0].q, *v_tile = shared.stage[1].q;
  if constexpr (!Config::kInRegisters) {
    k_tile = shared.k;
    v_tile = shared.v;
  }
  copy_span(k_tile, a.keys.k, a.keys.k_stride, a.keys.k_step);
  if (kDifference) copy_span(v_tile, a.keys.v, a.keys.v_stride, a.keys.v_step);
  shared.table.fill(a.keys, block, a.horizons, a.horizon_count, thread, Config::kThreads);
  wait_for_copies();
  __syncthreads();
  const uint32_t rows = first_key * kRowBytes<kHeadDim> + by_rows<kHeadDim>(lane);
  typename Config::Rows k, v;
  hold(k, shared_address(k_tile) + rows);
  if (kDifference) hold(v, shared_address(v_tile) + rows);
  const KeyBounds mine = shared.table.template bounds<1>(first_key, lane, a.horizon_count);
  if (lane == 0) shared.bounds[thread / kWarpSize] = mine;
  const KeyBounds all = shared.table.template bounds<Config::kWarps>(0, lane, a.horizon_count);
  if (thread == 0) {
    shared.range = query_range<kQueries>(all.first, all.max_horizon);
    shared.block = block;
  }
  __syncthreads();  // the range is known, and the stages are free

  QueryWalk<kQueries> walk(shared.range);
  const auto copy_queries = [&](int stage) {
    copy_query_tile_async<kHeadDim, Config::kThreads>(shared.stage[stage], thread, a.queries,
                                                      shared.block, walk, a.keys.tokens);
  };
  if (!walk.done(shared.range, a.queries.group)) copy_queries(0);

  HorizonSums sums;
  for (int stage = 0; !walk.done(shared.range, a.queries.group); stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // this tile is there, and nobody reads the last one any more
    const int32_t q0 = walk.position();
    walk.next(shared.range);
    if (!walk.done(shared.range, a.queries.group)) copy_queries(stage ^ 1);
    const Reach reach = reach_of<kQueries>(shared.table, shared.bounds[thread / kWarpSize],
                                           first_key, lane, a.horizon_count, q0);
    if (reach == Reach::kNone) continue;

    const QueryStage<kHeadDim>& tile = shared.stage[stage];
    const uint32_t columns = by_columns<kHeadDim>(lane);
#pragma unroll 1
    for (int step = 0; step < kQueries; step += kStep) {
      const uint32_t offset = step * kRowBytes<kHeadDim> + columns;
      float g[2][kN][4];
      clear(g);
      multiply_channels<kHeadDim>(g, k, shared_address(tile.q) + offset);
      float difference[2][kN][4];
      if (kDifference) {
        clear(difference);
        multiply_channels<kHeadDim>(difference, v, shared_address(tile.dout) + offset);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int column = step + n * 8 + lane % 4 * 2;
        const float2 lse = *reinterpret_cast<const float2*>(&tile.lse[column]);
        float2 delta{};
        if (kDifference) delta = *reinterpret_cast<const float2*>(&tile.delta[column]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float factor = probability(g[m][n][x], a.scale, x % 2 ? lse.y : lse.x);
            g[m][n][x] = fminf(factor, a.limit);
            if (kDifference) g[m][n][x] *= difference[m][n][x] - (x % 2 ? delta.y : delta.x);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (reach == Reach::kCut) {
          add_to_sums<true>(sums, g[m], m, shared.table, first_key, lane, a.horizon_count,
                            q0 + step);
        } else {
          add_to_sums<false>(sums, g[m], m, shared.table, first_key, lane, a.horizon_count,
                             q0 + step);
        }
      }
    }
  }
  sums.write(a.sums, shared.table, first_key, lane, a.horizon_count, a.keys, shared.block.head);
}

}  // namespace natslm::kernels::cuda
