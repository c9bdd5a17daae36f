// lse and delta of every query.
//
// delta is taken from the diagonal of a matrix product: the tensor cores then add up dout . out in
// the order in which they add up dout . v. Where a query sees one key alone, out = v, and the
// difference of the two must vanish.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cmath>
#include <numbers>

#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/dependent_launch.cuh"
#include "natslm/kernels/sm90/attention_backward.h"
#include "natslm/kernels/sm90/hopper.cuh"

namespace natslm::kernels::sm90 {
namespace {

constexpr int kRowsThreads = 128, kRowsOfWarp = 16;
constexpr int kRowsOfBlock = kRowsThreads / kWarpThreads * kRowsOfWarp;

// d += A * B: A [16][16], B [16][8]. Lane l holds rows l / 4 (+ 8) of A, columns 2 (l % 4) + {0, 1}
// (+ 8), column l / 4 of B likewise, and of d rows l / 4 (+ 8), columns 2 (l % 4) + {0, 1}.
__device__ inline void multiply_16_by_8(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A warp takes 16 rows of one head.
__global__ void __launch_bounds__(kRowsThreads)
    row_terms_kernel(const __grid_constant__ RowTermsArguments a) {
  cuda::admit_launch_behind();
  cuda::await_launch_before();
  if (blockIdx.x == 0 && threadIdx.x < kCounters) a.counters[threadIdx.x] = 0;
  const int32_t blocks = (a.tokens + kRowsOfBlock - 1) / kRowsOfBlock;
  const auto head_row = static_cast<int32_t>(blockIdx.x / blocks);
  const int32_t batch = head_row / a.q_heads, head = head_row - batch * a.q_heads;
  const int32_t lane = threadIdx.x % kWarpThreads;
  const int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * kRowsOfBlock +
                        static_cast<int32_t>(threadIdx.x) / kWarpThreads * kRowsOfWarp;
  const int32_t length = a.lengths ? a.lengths[batch] : a.tokens;
  const int32_t mine[2] = {first + lane / 4, first + lane / 4 + 8};

  const int32_t column = lane % 4 * 2;
  const __nv_bfloat16* dout[2];
  const __nv_bfloat16* out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    dout[i] = a.dout + batch * a.dout_stride.batch + head * a.dout_stride.head +
              mine[i] * a.dout_stride.token + column;
    out[i] = a.out + batch * a.out_stride.batch + head * a.out_stride.head +
             mine[i] * a.out_stride.token + column;
  }
  const auto load = [&](const __nv_bfloat16* const(&rows)[2], int i, int32_t channel) {
    return mine[i] < length ? *reinterpret_cast<const uint32_t*>(rows[i] + channel) : 0u;
  };
  float upper[4] = {}, lower[4] = {};  // rows 0..7 and 8..15 of out are the columns
#pragma unroll 4
  for (int32_t channel = 0; channel < a.head_dim; channel += 16) {
    const uint32_t x[4] = {load(dout, 0, channel), load(dout, 1, channel),
                           load(dout, 0, channel + 8), load(dout, 1, channel + 8)};
    const uint32_t y[2][2] = {{load(out, 0, channel), load(out, 0, channel + 8)},
                              {load(out, 1, channel), load(out, 1, channel + 8)}};
    multiply_16_by_8(upper, x, y[0]);
    multiply_16_by_8(lower, x, y[1]);
  }
  // Row r of 8 has its diagonal element in the lane that holds row r and columns r / 2 * 2 + {0,
  // 1}.
  if (lane % 4 != lane / 8) return;
  const bool odd = lane / 4 % 2 != 0;
  const float delta[2] = {odd ? upper[1] : upper[0], odd ? lower[3] : lower[2]};
  constexpr float kLog2E = std::numbers::log2e_v<float>;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (mine[i] >= a.tokens) continue;
    const int64_t from = int64_t{head_row} * a.tokens + mine[i];
    const int64_t stride = row_terms_stride(a.tokens), to = head_row * stride + mine[i];
    const float lse = mine[i] < length ? a.lse[from] : -INFINITY;
    const bool sees_keys = lse != -INFINITY;
    const float difference = sees_keys ? delta[i] : 0;
    a.terms[to] = sees_keys ? lse * kLog2E : INFINITY;
    a.terms[to + stride / 2] = difference;
    if (a.role_terms) {
      a.role_terms[to] = sees_keys ? a.role_lse[from] * kLog2E : INFINITY;
      a.role_terms[to + stride / 2] = difference;
    }
  }
}

}  // namespace

void launch_row_terms(const RowTermsArguments& arguments, bool behind, CUstream_st* stream) {
  const int64_t blocks = (int64_t{arguments.tokens} + kRowsOfBlock - 1) / kRowsOfBlock *
                         arguments.batch * arguments.q_heads;
  NATSLM_CHECK(blocks < int64_t{1} << 31, "attention_backward (sm90): ", blocks,
               " blocks are too many for one launch; use a smaller batch");
  const auto grid = static_cast<unsigned>(blocks);
  if (behind) {
    cuda::launch_dependent(row_terms_kernel, grid, kRowsThreads, 0, stream, arguments);
  } else {
    row_terms_kernel<<<grid, kRowsThreads, 0, stream>>>(arguments);
    NATSLM_CUDA(cudaGetLastError());
  }
}

}  // namespace natslm::kernels::sm90
