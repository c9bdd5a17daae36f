// The numbers per query that the backward kernels and the attention mass start from: log-sum-exp,
// safe for every row, and delta = dout . out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/launch.cuh"
#include "natslm/kernels/cuda/mma.cuh"

namespace natslm::kernels::cuda {

struct RowTermsArgs {
  const float* lse;            // [B, Hq, T], natural
  const float* role_lse;       // likewise, or null
  const BFloat16 *out, *dout;  // [B, Hq, T, D], or null: no delta
  Strides out_stride, dout_stride;
  const int32_t* lengths;  // [B] or null
  int32_t q_heads, tokens;
  int64_t rows;  // B * Hq * T
  // [B, Hq, T]. A query that sees no key or is past its length gets +inf and +inf, so that every
  // factor exp(s - lse) of it is 0, and 0.
  float *safe_lse, *safe_role_lse, *delta;
};

// Sum of the products of two times 8 bf16 numbers.
__device__ inline float dot_of_chunk(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(x[i] << 16), __uint_as_float(y[i] << 16), sum);
    sum = fmaf(__uint_as_float(x[i] & 0xffff0000u), __uint_as_float(y[i] & 0xffff0000u), sum);
  }
  return sum;
}

inline constexpr int kRowTermsThreads = 256;

// kHeadDim / 8 lanes read a row.
template <int kHeadDim>
__global__ __launch_bounds__(kRowTermsThreads) void row_terms_kernel(
    const __grid_constant__ RowTermsArgs a) {
  constexpr int kLanes = kHeadDim / 8;
  const int64_t row = (int64_t{blockIdx.x} * kRowTermsThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool exists = row < a.rows;
  const int32_t i = static_cast<int32_t>(row % a.tokens);
  const int64_t head = row / a.tokens;
  const int32_t b = static_cast<int32_t>(head / a.q_heads),
                h = static_cast<int32_t>(head % a.q_heads);
  const float lse = exists && (!a.lengths || i < a.lengths[b]) ? a.lse[row] : -kInfinity;
  const bool sees_keys = lse != -kInfinity;
  float delta = 0;
  if (a.dout && sees_keys) {
    const auto chunk = [&](const BFloat16* array, const Strides& stride) {
      const BFloat16* from = array + b * stride.batch + h * stride.head + i * stride.token;
      return reinterpret_cast<const uint4*>(from)[lane];
    };
    delta = dot_of_chunk(chunk(a.out, a.out_stride), chunk(a.dout, a.dout_stride));
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
  if (!exists || lane != 0) return;
  a.safe_lse[row] = sees_keys ? lse : kInfinity;
  if (a.role_lse) a.safe_role_lse[row] = sees_keys ? a.role_lse[row] : kInfinity;
  if (a.dout) a.delta[row] = delta;
}

template <int kHeadDim>
void launch_row_terms(const char* name, const RowTermsArgs& args, CUstream_st* stream) {
  constexpr int64_t kRows = kRowTermsThreads / (kHeadDim / 8);
  launch(name, row_terms_kernel<kHeadDim>, (args.rows + kRows - 1) / kRows, kRowTermsThreads, 0,
         stream, args);
}

}  // namespace natslm::kernels::cuda
