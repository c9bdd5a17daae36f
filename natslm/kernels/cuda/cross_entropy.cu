// One block a row, two passes over it: the maximum and the sum of exponentials together, then the
// gradient. A row of 50,304 bf16 logits is 100 KB; the rows of all blocks at work stay in the
// second level cache between the passes. SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/kernels/cross_entropy.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/vectors.cuh"

namespace natslm::kernels::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

// 2^x in one instruction; what is below the normal numbers becomes 0.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp2 of logits * log2(e), summed relative to the largest one seen so far.
struct Exponentials {
  float top, sum;  // the sum is 0 while top is -infinity
};

__device__ inline Exponentials merged(Exponentials a, Exponentials b) {
  const float top = fmaxf(a.top, b.top);
  if (top == -INFINITY) return {top, 0};
  return {top, a.sum * power_of_2(a.top - top) + b.sum * power_of_2(b.top - top)};
}

// Over the block, the same bits in every thread.
__device__ inline Exponentials block_merged(Exponentials x) {
  __shared__ Exponentials warps[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const Exponentials other = {__shfl_xor_sync(0xffffffffu, x.top, distance),
                                __shfl_xor_sync(0xffffffffu, x.sum, distance)};
    x = merged(x, other);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
#pragma unroll 4
  for (int i = 1; i < kWarps; ++i) x = merged(x, warps[i]);
  return x;
}

__global__ void __launch_bounds__(kThreads, 3) kernel(CrossEntropy p) {
  const int64_t row = blockIdx.x;
  BFloat16* logits = static_cast<BFloat16*>(p.logits) + row * p.columns;
  const int32_t target = p.targets[row];
  const bool inside = target >= 0 && target < p.vocabulary;
  // Read before the gradient takes its place.
  const float chosen = inside ? __uint_as_float(uint32_t{logits[target].bits} << 16) : NAN;

  Exponentials x = {-INFINITY, 0};
#pragma unroll 4
  for (int32_t c = 8 * static_cast<int32_t>(threadIdx.x); c < p.vocabulary; c += 8 * kThreads) {
    Floats8 v = load8(logits + c);
    float top = x.top;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      v.v[e] = c + e < p.vocabulary ? v.v[e] * kLog2E : -INFINITY;
      top = fmaxf(top, v.v[e]);
    }
    if (top == -INFINITY) continue;
    float sum = x.sum * power_of_2(x.top - top);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += power_of_2(v.v[e] - top);
    x = {top, sum};
  }
  x = block_merged(x);
  const float log2_sum = x.top + log2f(x.sum);
  if (threadIdx.x == 0) p.loss[row] = log2_sum * kLn2 - chosen;
  if (!p.gradient) return;

  const float weight = p.weights ? p.weight * p.weights[row] : p.weight;
#pragma unroll 4
  for (int32_t c = 8 * static_cast<int32_t>(threadIdx.x); c < p.columns; c += 8 * kThreads) {
    Floats8 v = load8(logits + c);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float softmax = power_of_2(v.v[e] * kLog2E - log2_sum);
      v.v[e] = c + e >= p.vocabulary ? 0.0f : weight * (softmax - (c + e == target ? 1.0f : 0.0f));
    }
    store8(logits + c, v);
  }
}

}  // namespace

std::string_view why_not(const CrossEntropy& p) {
  if (p.rows < 0 || p.rows > (int64_t{1} << 31) - 1) return "rows must be 0 to 2^31 - 1";
  if (p.vocabulary < 1) return "vocabulary must be positive";
  if (p.columns < p.vocabulary) return "columns must be at least the vocabulary";
  if (p.columns > (1 << 30)) return "columns must be at most 2^30";
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16";
  if (p.columns % 8 != 0) return "columns must be a multiple of 8";
  return aligned16(p.logits) ? "" : "logits must be 16-byte aligned";
}

void run(const CrossEntropy& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "cross entropy: ", why_not(p), "; got ", p.vocabulary, " of ",
               p.columns, " columns");
  if (p.rows == 0) return;
  kernel<<<static_cast<uint32_t>(p.rows), kThreads, 0, stream>>>(p);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
