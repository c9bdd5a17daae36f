// Gradient of the queries: like the forward pass, but with probabilities known from the stored
// log-sum-exp, and dout . v beside the scores.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/query_parallel.cuh"

namespace natslm::kernels::cuda {

template <int kHeadDim>
struct QueryGradientConfig {
  static constexpr bool kLarge = kHeadDim > 128;
  static constexpr int kRows = kLarge ? 64 : 128, kKeys = 32, kStages = 2;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = kLarge ? 1 : kHeadDim == 64 ? 3 : 2;
  static constexpr int kRowsOfWarp = kRows / 4;
  static constexpr int kM = kRowsOfWarp / 16, kN = kKeys / 8;

  struct Shared {
    alignas(kTileAlignment<kHeadDim>) uint8_t q[kRows * kRowBytes<kHeadDim>];  // at the end, dq
    alignas(kTileAlignment<kHeadDim>) uint8_t dout[kRows * kRowBytes<kHeadDim>];
    alignas(kTileAlignment<kHeadDim>) uint8_t k[kStages][kKeys * kRowBytes<kHeadDim>];
    alignas(kTileAlignment<kHeadDim>) uint8_t v[kStages][kKeys * kRowBytes<kHeadDim>];
    alignas(16) KeyLimits limits[kStages][kKeys];
    QueryTile tile;
    TileKeys keys;
    int32_t row_position[kRows];
  };
};

struct QueryGradientArgs {
  KeyPlan plan;
  QuerySource queries;
  float scale;
  BFloat16* dq;  // [B, Hq, T, D]
  Strides dq_stride;
};

template <int kHeadDim>
__global__ __launch_bounds__(
    QueryGradientConfig<kHeadDim>::kThreads,
    QueryGradientConfig<kHeadDim>::kBlocksPerSm) void query_gradient_kernel(const __grid_constant__
                                                                                QueryGradientArgs
                                                                                    a) {
  using Config = QueryGradientConfig<kHeadDim>;
  constexpr int kM = Config::kM, kN = Config::kN;
  auto& shared = *reinterpret_cast<typename Config::Shared*>(block_memory());
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int first_row = thread / kWarpSize * Config::kRowsOfWarp;

  const QueryTile tile = query_tile(a.plan, a.queries.group, blockIdx.x);
  static_assert(Config::kRows <= Config::kThreads);
  if (thread == 0) shared.tile = tile;
  float dq[kM][kHeadDim / 8][4];
  clear(dq);
  if (tile.first < tile.length) {
    KeyWalk<Config::kKeys> walk(shared.keys);
    const uint32_t q = shared_address(shared.q), dout = shared_address(shared.dout);
    const uint32_t k = shared_address(shared.k), v = shared_address(shared.v);
    constexpr uint32_t kStageBytes = sizeof(shared.k[0]);
    const auto copy_keys = [&](int stage) {
      copy_keys_async<kHeadDim, Config::kKeys, Config::kThreads>(
          k + stage * kStageBytes, v + stage * kStageBytes, shared.limits[stage], thread, walk,
          shared.keys, a.plan.keys.k_step, a.plan.keys.v_step);
    };
    copy_queries_async<kHeadDim, Config::kRows, Config::kThreads>(q, thread, tile, a.queries.q,
                                                                  a.queries.q_stride);
    copy_queries_async<kHeadDim, Config::kRows, Config::kThreads>(
        dout, thread, tile, a.queries.dout, a.queries.dout_stride);
    if (Config::kRows == Config::kThreads || thread < Config::kRows) {
      shared.row_position[thread] = tile.position(thread);
    }
    if (thread == 0) shared.keys = tile_keys(a.plan, tile);
    __syncthreads();  // the keys to walk over
    bool more = walk.next();
    bool full = walk.is_full();
    if (more) copy_keys(0);

    float lse[kM][2], delta[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + m * 16 + half * 8 + lane / 4;
        lse[m][half] = tile.in_use(row) ? a.queries.terms.lse[tile.flat(row)] : kInfinity;
        delta[m][half] = tile.in_use(row) ? a.queries.terms.delta[tile.flat(row)] : 0;
      }
    }
    const uint32_t rows = first_row * kRowBytes<kHeadDim> + by_rows<kHeadDim>(lane);
    const uint32_t columns = by_columns<kHeadDim>(lane);
    for (int stage = 0; more; stage ^= 1) {
      wait_for_copies();
      __syncthreads();  // this tile is there, and nobody reads the last one any more
      const bool test = !full;
      more = walk.next();
      full = walk.is_full();
      if (more) copy_keys(stage ^ 1);

      const uint32_t offset = stage * kStageBytes;
      float weight[kM][kN][4], ds[kM][kN][4];
      clear(weight);
      clear(ds);
      multiply_channels<kHeadDim>(weight, q + rows, k + offset + columns);
      multiply_channels<kHeadDim>(ds, dout + rows, v + offset + columns);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const float p = probability(weight[m][n][x], a.scale, lse[m][x / 2]);
            ds[m][n][x] = p * (ds[m][n][x] - delta[m][x / 2]);
          }
        }
      }
      if (test) {
        for_visible<kM, kN>(shared.limits[stage], shared.row_position + first_row, lane,
                            [&](int m, int n, int x, bool is_visible) {
                              ds[m][n][x] = is_visible ? ds[m][n][x] : 0;
                            });
      }
      multiply_weights<kHeadDim>(dq, ds, k + offset + by_rows<kHeadDim>(lane));
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool in_use = shared.tile.in_use(first_row + m * 16 + half * 8 + lane / 4);
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
          for (int x = 2 * half; x < 2 * half + 2; ++x) {
            dq[m][d][x] = in_use ? dq[m][d][x] * a.scale : 0;
          }
        }
      }
    }
    wait_for_copies();  // of a tile without keys: nothing else has waited for q
  }
  __syncthreads();
  store_tile<kHeadDim>(shared.q, first_row, lane, dq);
  __syncwarp();
  write_queries<kHeadDim, Config::kRowsOfWarp>(a.dq, a.dq_stride, shared.tile, shared.q, first_row,
                                               lane);
}

}  // namespace natslm::kernels::cuda
