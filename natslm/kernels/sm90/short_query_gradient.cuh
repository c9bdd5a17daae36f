// Gradient of the queries of a short text on Hopper (short_texts.cuh): dq += dS K over the tiles of
// listed keys, with probabilities known from the stored log-sum-exp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/dependent_launch.cuh"
#include "natslm/kernels/sm90/attention_backward.h"
#include "natslm/kernels/sm90/short_texts.cuh"

namespace natslm::kernels::sm90 {

template <int kHeadDim_>
struct ShortQueryGradientConfig {
  static constexpr int kHeadDim = kHeadDim_, kHalves = kHeadDim / kSwizzleColumns;
  static constexpr int kRows = short_rows(kHeadDim), kThreads = 2 * kRows;
  static constexpr int kWarps = kThreads / kWarpThreads, kWarpgroups = kRows / kTileRows;
  // In a thread: kHeadDim / 2 for the gradient, 2 x 32 for scores and differences, 16 for dS. Q and
  // dout stay in shared memory.
  static constexpr int kBlocks = 2;  // of a multiprocessor
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;

  struct alignas(kSwizzleBytes) Shared {
    ListStage<kHeadDim> stage[kStages];
    TileHalf q[kWarpgroups][kHalves], dout[kWarpgroups][kHalves];
    int32_t found[kWarps];
    alignas(16) ListedKey list[kShortTokens];
  };
  static_assert(kBlocks * (sizeof(Shared) + 1024) <= 228 * 1024, "of a multiprocessor");
};

template <class Config>
struct ShortQueryGradient {
  static constexpr int kHeadDim = Config::kHeadDim;
  using Gradient = float[kHeadDim / 2];

  const ShortQueryGradientArguments& a;
  const ShortTile& tile;
  const TwoRows& rows;

  // The warpgroup's rows of Q and dout; zeros for those that do not exist.
  __device__ void start_queries(TileHalf* q, TileHalf* dout, int32_t first_row) const {
    using Copy = RowCopy<kHeadDim, kWarpgroupThreads>;
    const Copy copy(threadIdx.x % kWarpgroupThreads);
    const cuda::PackedRows& packed = a.packed;
    const uint32_t to_q = shared_address(q), to_dout = shared_address(dout);
    const auto head_of = [&](const __nv_bfloat16* array, const Strides& stride) {
      return array + tile.batch * stride.batch + tile.kv_head * a.group * stride.head +
             copy.chunk * 8;
    };
    const __nv_bfloat16* from_q = head_of(a.q, a.q_stride);
    const __nv_bfloat16* from_dout = head_of(a.dout, a.dout_stride);
#pragma unroll 4
    for (int pass = 0; pass < Copy::kPasses; ++pass) {
      const int32_t row = first_row + copy.row_of(pass);
      const int32_t offset = packed.position(row);
      const bool counts = tile.first_query + offset <= tile.queries.q1;
      const int32_t position = counts ? tile.first_query + offset : 0;
      const int32_t head = packed.head(row);
      copy_async(to_q + copy.offset_of(pass),
                 from_q + head * a.q_stride.head + position * a.q_stride.token, counts);
      copy_async(to_dout + copy.offset_of(pass),
                 from_dout + head * a.dout_stride.head + position * a.dout_stride.token, counts);
    }
    copy_async_commit();
  }

  template <class Shared>
  __device__ void run(Shared& shared) const {
    const int32_t warpgroup =
        __shfl_sync(~0u, static_cast<int32_t>(threadIdx.x) / kWarpgroupThreads, 0);
    const KeyScan<Config::kWarps> scan(a, tile);
    start_queries(shared.q[warpgroup], shared.dout[warpgroup], warpgroup * kTileRows);
    const QuerySpan mine = queries_of_rows(tile.queries, a.group, warpgroup * kTileRows, kTileRows);
    const int32_t count = scan.list_keys(tile.queries, shared.list, shared.found);
    const ListedRows<kHeadDim, Config::kThreads> keys(a, tile, shared.list);
    start_first_tiles(keys, shared.stage, count);
    // All up to here was there before the terms.
    cuda::await_launch_before();
    float lse[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows.exists[i]) {
        const int64_t stride = row_terms_stride(a.tokens);
        const float* terms = a.terms + index_in(stride, a, tile, rows, i);
        lse[i] = terms[0];
        delta[i] = terms[stride / 2];
      }
    }
    Gradient dq = {};
    for_key_tiles(
        keys, shared.stage, shared.list, count,
        [&](const ListStage<kHeadDim>& stage, const ListedKey* list) {
          const TileReading reading = reading_of_tile(mine, list);
          if (reading.is_dead()) return;
          PairRegisters factor, difference;
          uint32_t products[kPairsOfThread / 2];
          start_pairs<kHeadDim>(factor, matrix_descriptor(shared.q[warpgroup]),
                                matrix_descriptor(stage.k));
          start_pairs<kHeadDim>(difference, matrix_descriptor(shared.dout[warpgroup]),
                                matrix_descriptor(stage.v));
          wgmma_wait<1>();
          fence_registers(factor);
          hide(factor, reading, list, rows.position);
#pragma unroll
          for (int i = 0; i < kPairsOfThread; ++i) {
            factor[i] = exp2_fast(fmaf(factor[i], a.scale_log2, -lse[i / 2 % 2]));
          }
          wgmma_wait<0>();
          fence_registers(difference);
#pragma unroll
          for (int i = 0; i < kPairsOfThread; ++i) {
            factor[i] *= difference[i] - delta[i / 2 % 2];
          }
          round_pairs(products, factor);
          fence_registers(products);
          fence_registers(dq);
          add_rows<kHeadDim>(dq, products, channel_descriptor(stage.k));
          // Here and not before the next tile: the compiler would let no two products overlap.
          wgmma_wait<0>();
          fence_registers(dq);
        },
        [] {});
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_row(row_in(a.out, a.out_stride, a, tile, rows, i), dq, i, a.scale,
                rows.position[i] < tile.length, rows.exists[i]);
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    short_query_gradient_kernel(const __grid_constant__ ShortQueryGradientArguments arguments) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(shared_bytes);
  const ShortTile tile = short_tile(arguments);
  if (!is_there(arguments, tile)) return;
  const TwoRows rows(arguments, tile);
  ShortQueryGradient<Config>{arguments, tile, rows}.run(shared);
}

template <int kHeadDim>
void launch_short_query_gradient(const ShortQueryGradientArguments& arguments,
                                 CUstream_st* stream) {
  using Config = ShortQueryGradientConfig<kHeadDim>;
  const auto kernel = short_query_gradient_kernel<Config>;
  constexpr size_t kSharedBytes = sizeof(typename Config::Shared);
  let_blocks_share(kernel, kSharedBytes);
  cuda::launch_dependent(kernel, short_grid(arguments), Config::kThreads, kSharedBytes, stream,
                         arguments);
}

}  // namespace natslm::kernels::sm90
