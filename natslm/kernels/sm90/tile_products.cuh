// Products of tiles of 64 rows by one warpgroup. A tile [64][D] of bfloat16 in shared memory is
// made of its halves of 64 channels, [64][kSwizzleColumns] each, swizzled and one after the other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "natslm/kernels/sm90/hopper.cuh"

namespace natslm::kernels::sm90 {

inline constexpr int kTileRows = 64;
using TileHalf = __nv_bfloat16[kTileRows][kSwizzleColumns];

// Of a thread, of a product [64][64]: element 4 n + 2 row + x belongs to its row `row` (of two, 8
// apart) and column 8 n + 2 (lane % 4) + x.
inline constexpr int kPairsOfThread = kTileRows / 2;
using PairRegisters = float[kPairsOfThread];

// A tile as a left operand in registers, 16 channels a step.
template <int kHeadDim>
using RowOperand = uint32_t[kHeadDim / 16][4];

// Bytes from the start of a tile to channel 16 * step.
__device__ constexpr uint32_t step_offset(int step) {
  return step / 4 * sizeof(TileHalf) + step % 4 * 32;
}

// pairs = rows * columns^T over the channels; one group of multiplications.
template <int kHeadDim>
__device__ inline void start_pairs(PairRegisters& pairs, uint64_t rows, uint64_t columns) {
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const uint32_t offset = step_offset(step);
    wgmma_m64n64k16(pairs, advance(rows, offset), advance(columns, offset), step > 0);
  }
  wgmma_commit();
}
template <int kHeadDim>
__device__ inline void start_pairs(PairRegisters& pairs, const RowOperand<kHeadDim>& rows,
                                   uint64_t columns) {
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    wgmma_m64n64k16_rows(pairs, rows[step], advance(columns, step_offset(step)), step > 0);
  }
  wgmma_commit();
}

// sums += weights * rows of a tile, whose descriptor names the distance of its halves
// (channel_descriptor); one group of multiplications.
template <int kHeadDim>
__device__ inline void add_rows(float (&sums)[kHeadDim / 2],
                                const uint32_t (&weights)[kPairsOfThread / 2], uint64_t rows) {
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kTileRows / 16; ++step) {
    const uint64_t from = advance(rows, step * 16 * kSwizzleColumns * 2);
    if constexpr (kHeadDim == 64) {
      wgmma_m64n64k16(sums, weights + 4 * step, from);
    } else {
      wgmma_m64n128k16(sums, weights + 4 * step, from);
    }
  }
  wgmma_commit();
}

// A tile as the right operand of add_rows.
__device__ inline uint64_t channel_descriptor(const TileHalf* tile) {
  return matrix_descriptor(tile, sizeof(TileHalf));
}

}  // namespace natslm::kernels::sm90
