// Work on the accumulator of a score multiplication, [64 rows][kTileKeys keys] in a warpgroup's
// registers: hiding pairs, online softmax, rounding for the next multiplication. A thread holds two
// rows, 8 apart, and shares them with three others (hopper.cuh).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/sm90/attention_forward.config.cuh"
#include "natslm/kernels/sm90/hopper.cuh"

namespace natslm::kernels::sm90 {

// Scores of pairs that are not visible become -inf. `queries`: positions of the thread's two rows.
__device__ inline void hide(float (&scores)[kTileKeys / 2], uint32_t flags,
                            const int32_t (&position)[kTileKeys], const int32_t (&last)[kTileKeys],
                            const int32_t (&queries)[2]) {
  if (!(flags & kPiecesToTest)) return;
  const int32_t column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int piece = 0; piece < kTilePieces; ++piece) {
    if (!piece_needs_test(flags, piece)) continue;
#pragma unroll
    for (int block = 2 * piece; block < 2 * piece + 2; ++block) {
      const int2 p = *reinterpret_cast<const int2*>(&position[8 * block + column]);
      const int2 l = *reinterpret_cast<const int2*>(&last[8 * block + column]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float* pair = scores + 4 * block + 2 * row;
        if (!visible(queries[row], p.x, l.x)) pair[0] = -INFINITY;
        if (!visible(queries[row], p.y, l.y)) pair[1] = -INFINITY;
      }
    }
  }
}

// Sum or maximum over the four threads that share a row.
template <class Combine>
__device__ inline float over_row(float x, Combine&& combine) {
  x = combine(x, __shfl_xor_sync(~0u, x, 1));
  return combine(x, __shfl_xor_sync(~0u, x, 2));
}

// Running softmax of the thread's two rows. Exponentials are taken relative to `reference`, a score
// seen before. It follows the maximum only when that has grown by more than kSlack (in powers of
// two): bfloat16 probabilities and float sums have the range for it, and the output is then rarely
// scaled again.
struct Softmax {
  static constexpr float kSlack = 8;
  float scale_log2;
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // of this thread's columns

  // Scores become exponentials; sets what earlier output must be multiplied by.
  template <int kScores>
  __device__ void update(float (&scores)[kScores], float (&factor)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float largest = scores[2 * row];
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) {
        largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
      }
      largest = over_row(largest, [](float x, float y) { return fmaxf(x, y); });

      factor[row] = 1;
      // Not so where nothing is visible yet: -inf - -inf is no number.
      if ((largest - reference[row]) * scale_log2 > kSlack) {
        factor[row] = exp2_fast((reference[row] - largest) * scale_log2);
        reference[row] = largest;
      }
      const float offset = reference[row] == -INFINITY ? 0 : reference[row] * scale_log2;
      float total = 0;
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], scale_log2, -offset));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale_log2, -offset));
        total += scores[i] + scores[i + 1];
      }
      sum[row] = fmaf(sum[row], factor[row], total);
    }
  }
};

template <int kCount>
__device__ inline void rescale(float (&out)[kCount], const float (&factor)[2]) {
  if (!__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] *= factor[i / 2 % 2];
}

// The layout of an accumulator is that of the left operand of the next multiplication.
template <int kPairs>
__device__ inline void round_pairs(uint32_t (&to)[kPairs], const float (&from)[2 * kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) to[i] = pack_bfloat16(from[2 * i], from[2 * i + 1]);
}

// words[j] of the four threads that share a row become words[0..3] of thread j.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, high ? words[i] : words[i + bit], bit);
      (high ? words[i] : words[i + bit]) = got;
    }
  }
}

// Row `row` (of two, 8 apart) of an accumulator, times `factor`, or zeros where nothing `counts`,
// to memory where the row `exists`. 16 bytes a thread: four threads write 64 bytes of the row.
template <int kCount>
__device__ inline void store_row(__nv_bfloat16* to, const float (&from)[kCount], int row,
                                 float factor, bool counts, bool exists) {
#pragma unroll
  for (int block = 0; block < kCount / 4; block += 4) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* pair = from + 4 * (block + j) + 2 * row;
      words[j] = counts ? pack_bfloat16(pair[0] * factor, pair[1] * factor) : 0;
    }
    transpose_quad(words);
    if (exists) store_16_bytes(to + 8 * (block + threadIdx.x % 4), words);
  }
}

}  // namespace natslm::kernels::sm90
