// Attention of a short text on Hopper, in one launch (short_texts.cuh).
//
// A warpgroup works on 64 rows; Q stays in its registers. Nothing of two tiles overlaps inside a
// warpgroup except copies: the four of a multiprocessor take turns at the tensor cores by
// themselves.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/short_texts.cuh"

namespace natslm::kernels::sm90 {

template <int kHeadDim_>
struct ShortForwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = short_rows(kHeadDim), kThreads = 2 * kRows;
  static constexpr int kWarps = kThreads / kWarpThreads;
  static_assert(kThreads % kWarpgroupThreads == 0);
  // In a thread: kHeadDim / 2 for the output, kHeadDim / 4 for Q, 32 for scores, 16 for
  // probabilities; 128 registers at head size 64, 168 at 128.
  static constexpr int kBlocks = kHeadDim == 64 ? 2 : 3;  // of a multiprocessor
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;

  struct alignas(kSwizzleBytes) Shared {
    ListStage<kHeadDim> stage[kStages];
    int32_t found[kWarps];
    alignas(16) ListedKey list[kShortTokens];
  };
  static_assert(kBlocks * (sizeof(Shared) + 1024) <= 228 * 1024, "of a multiprocessor");
};

template <class Config>
struct ShortForward {
  static constexpr int kHeadDim = Config::kHeadDim;
  using Output = float[kHeadDim / 2];

  const ShortForwardArguments& a;
  const ShortTile& tile;
  const TwoRows& rows;

  // Rows of Q that do not exist count as zeros.
  __device__ void load_q(RowOperand<kHeadDim>& q) const {
    const int32_t channel = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool counts = rows.exists[i] && rows.position[i] < tile.length;
      const __nv_bfloat16* row = row_in(a.q, a.q_stride, a, tile, rows, i) + channel;
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          q[step][2 * right + i] =
              counts ? *reinterpret_cast<const uint32_t*>(row + 16 * step + 8 * right) : 0;
        }
      }
    }
  }

  __device__ void store(const Output& out, const Softmax& softmax) const {
    float sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = over_row(softmax.sum[i], [](float x, float y) { return x + y; });
      store_row(row_in(a.out, a.out_stride, a, tile, rows, i), out, i, __fdividef(1, sum[i]),
                sees(i, sum[i]), rows.exists[i]);
    }
    // Of the four threads that share the two rows the first two store lse, each for one row: the
    // logarithm is long.
    const auto mine = static_cast<int32_t>(threadIdx.x % 4);
    const float of_mine = mine == 0 ? sum[0] : sum[1];
    const float log_sum = logf(of_mine);
    const float reference = mine == 0 ? softmax.reference[0] : softmax.reference[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (mine == i && rows.exists[i]) {
        a.lse[index_in(a.tokens, a, tile, rows, i)] =
            sees(i, of_mine) ? fmaf(reference, a.scale, log_sum) : -INFINITY;
      }
    }
  }
  __device__ bool sees(int i, float sum) const {
    return rows.position[i] < tile.length && sum != 0;
  }

  template <class Shared>
  __device__ void run(Shared& shared) const {
    RowOperand<kHeadDim> q;
    const KeyScan<Config::kWarps> scan(a, tile);
    load_q(q);
    const int32_t count = scan.list_keys(tile.queries, shared.list, shared.found);
    const ListedRows<kHeadDim, Config::kThreads> keys(a, tile, shared.list);
    start_first_tiles(keys, shared.stage, count);
    const QuerySpan mine = queries_of_rows(
        tile.queries, a.group, static_cast<int32_t>(threadIdx.x) / kWarpgroupThreads * kTileRows,
        kTileRows);
    Softmax softmax{a.scale_log2};
    Output out = {};
    for_key_tiles(
        keys, shared.stage, shared.list, count,
        [&](const ListStage<kHeadDim>& stage, const ListedKey* list) {
          const TileReading reading = reading_of_tile(mine, list);
          if (reading.is_dead()) return;
          PairRegisters scores;
          uint32_t probabilities[kPairsOfThread / 2];
          float factor[2];
          start_pairs<kHeadDim>(scores, q, matrix_descriptor(stage.k));
          wgmma_wait<0>();
          fence_registers(scores);
          hide(scores, reading, list, rows.position);
          softmax.update(scores, factor);
          rescale(out, factor);
          round_pairs(probabilities, scores);
          fence_registers(probabilities);
          fence_registers(out);
          add_rows<kHeadDim>(out, probabilities, channel_descriptor(stage.v));
        },
        [&] {
          wgmma_wait<0>();
          fence_registers(out);
        });
    store(out, softmax);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    short_forward_kernel(const __grid_constant__ ShortForwardArguments arguments) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(shared_bytes);
  const ShortTile tile = short_tile(arguments);
  if (!is_there(arguments, tile)) return;
  const TwoRows rows(arguments, tile);
  ShortForward<Config>{arguments, tile, rows}.run(shared);
}

template <int kHeadDim>
void launch_short_forward(const ShortForwardArguments& arguments, CUstream_st* stream) {
  using Config = ShortForwardConfig<kHeadDim>;
  const auto kernel = short_forward_kernel<Config>;
  constexpr size_t kSharedBytes = sizeof(typename Config::Shared);
  let_blocks_share(kernel, kSharedBytes);
  kernel<<<short_grid(arguments), Config::kThreads, kSharedBytes, stream>>>(arguments);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::sm90
