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

inline constexpr int kRowTermsThreads = 256;
inline constexpr int kRowTermsRows = 16;  // of a warp

// delta is the diagonal of dout * out^T: the matrix units then add it up in the order in which they
// add up dout . v. Where a query sees one key alone, out = v, and their difference must vanish.
template <int kHeadDim>
__global__ __launch_bounds__(kRowTermsThreads) void row_terms_kernel(
    const __grid_constant__ RowTermsArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (int64_t{blockIdx.x} * kRowTermsThreads + threadIdx.x) / 32 * kRowTermsRows;
  const int64_t rows[2] = {first + lane / 4, first + lane / 4 + 8};
  float lse[2];
  const BFloat16* out[2] = {};  // this lane's channels of the two rows; null: no delta
  const BFloat16* dout[2] = {};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int32_t i = static_cast<int32_t>(rows[n] % a.tokens);
    const int64_t head = rows[n] / a.tokens;
    const int32_t b = static_cast<int32_t>(head / a.q_heads),
                  h = static_cast<int32_t>(head % a.q_heads);
    lse[n] = rows[n] < a.rows && (!a.lengths || i < a.lengths[b]) ? a.lse[rows[n]] : -kInfinity;
    if (!a.dout || lse[n] == -kInfinity) continue;
    const int channel = lane % 4 * 2;
    out[n] =
        a.out + b * a.out_stride.batch + h * a.out_stride.head + i * a.out_stride.token + channel;
    dout[n] = a.dout + b * a.dout_stride.batch + h * a.dout_stride.head + i * a.dout_stride.token +
              channel;
  }
  const auto load = [](const BFloat16* from, int channel) {
    return from ? *reinterpret_cast<const uint32_t*>(from + channel) : 0u;
  };
  float upper[4] = {}, lower[4] = {};  // out's rows 0 .. 7 and 8 .. 15 are the columns
#pragma unroll
  for (int c = 0; c < kHeadDim; c += 16) {
    const uint32_t x[4] = {load(dout[0], c), load(dout[1], c), load(dout[0], c + 8),
                           load(dout[1], c + 8)};
    multiply_16x8x16(upper, x, load(out[0], c), load(out[0], c + 8));
    multiply_16x8x16(lower, x, load(out[1], c), load(out[1], c + 8));
  }
  // The diagonal element of a row is with the lane that holds columns row / 2 * 2 and the next.
  if (lane % 4 != lane / 8) return;
  const int odd = lane / 4 % 2;
  const float delta[2] = {odd ? upper[1] : upper[0], odd ? lower[3] : lower[2]};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (rows[n] >= a.rows) continue;
    const bool sees_keys = lse[n] != -kInfinity;
    a.safe_lse[rows[n]] = sees_keys ? lse[n] : kInfinity;
    if (a.role_lse) a.safe_role_lse[rows[n]] = sees_keys ? a.role_lse[rows[n]] : kInfinity;
    if (a.dout) a.delta[rows[n]] = sees_keys ? delta[n] : 0;
  }
}

template <int kHeadDim>
void launch_row_terms(const char* name, const RowTermsArgs& args, CUstream_st* stream) {
  constexpr int64_t kRows = kRowTermsThreads / 32 * kRowTermsRows;
  launch(name, row_terms_kernel<kHeadDim>, (args.rows + kRows - 1) / kRows, kRowTermsThreads, 0,
         stream, args);
}

}  // namespace natslm::kernels::cuda
