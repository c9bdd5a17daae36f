// Bound by memory: a thread turns eight channel pairs with two 16-byte accesses each way. The angle
// tables are small enough for the caches; threads that follow each other share a token.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/vectors.cuh"
#include "natslm/kernels/rotary.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Turns eight pairs (a, b) by the angles at cos and sin; `sign` -1 turns back.
__device__ inline void turn(Floats8& a, Floats8& b, const float* cos, const float* sin,
                            float sign) {
  const Floats8 c = load8(cos), s = load8(sin);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float x = a.v[e], y = b.v[e], turned = sign * s.v[e];
    a.v[e] = x * c.v[e] - y * turned;
    b.v[e] = y * c.v[e] + x * turned;
  }
}

// An item is one piece (eight pairs) of one head of one token; pieces of a token follow each other.
__global__ void __launch_bounds__(kThreads) forward_kernel(RotaryForward p, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int half = p.head_dim / 2, pieces = half / 8, per_row = pieces * p.heads;
  const int64_t row = item / per_row;
  const int in_row = static_cast<int>(item - row * per_row);
  const int head = in_row / pieces, c = 8 * (in_row - head * pieces);
  BFloat16* x = static_cast<BFloat16*>(p.x) + row * p.columns + int64_t{head} * p.head_dim + c;
  const int64_t angle = row % p.tokens * half + c;
  Floats8 a = load8(x), b = load8(x + half);
  turn(a, b, p.cos + angle, p.sin + angle, 1.0f);
  store8(x, a);
  store8(x + half, b);
}

// An item is one piece of a head (eight pairs, of values just 16 numbers), or eight columns of what
// follows the heads.
__global__ void __launch_bounds__(kThreads) backward_kernel(RotaryBackward p, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int half = p.head_dim / 2, pieces = half / 8;
  const int heads = p.q_heads + 2 * p.kv_heads, head_columns = heads * p.head_dim;
  const int tail = static_cast<int>(p.columns - head_columns) / 8;  // whole vectors after the heads
  const int per_row = pieces * heads + tail;
  const int64_t row = item / per_row;
  const int in_row = static_cast<int>(item - row * per_row);
  BFloat16* to = static_cast<BFloat16*>(p.dfused) + row * p.columns;

  if (in_row >= pieces * heads) {
    const int first = 8 * (in_row - pieces * heads);
    Floats8 x;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x.v[e] = first + e < p.rest ? p.drest[row * p.rest + first + e] : 0.0f;
    store8(to + head_columns + first, x);
    return;
  }
  const int head = in_row / pieces, c = 8 * (in_row - head * pieces);
  const int64_t b = row / p.tokens, t = row - b * p.tokens;
  const auto at = [&](const void* base, const Strides& stride, int h) {
    return static_cast<const BFloat16*>(base) + b * stride.batch + h * stride.head +
           t * stride.token + c;
  };
  const bool is_value = head >= p.q_heads + p.kv_heads;
  const BFloat16* from = head < p.q_heads ? at(p.dq, p.dq_stride, head)
                         : is_value       ? at(p.dv, p.dv_stride, head - p.q_heads - p.kv_heads)
                                          : at(p.dk, p.dk_stride, head - p.q_heads);
  Floats8 x = load8(from), y = load8(from + half);
  if (!is_value) turn(x, y, p.cos + t * half + c, p.sin + t * half + c, -1.0f);
  to += int64_t{head} * p.head_dim + c;
  store8(to, x);
  store8(to + half, y);
}

uint32_t blocks_for(int64_t items) {
  return static_cast<uint32_t>((items + kThreads - 1) / kThreads);
}

bool multiples_of_8(const Strides& s) {
  return s.batch % 8 == 0 && s.head % 8 == 0 && s.token % 8 == 0;
}

}  // namespace

std::string_view why_not(const RotaryForward& p) {
  if (p.batch < 0 || p.tokens < 0 || p.heads < 0) return "sizes must not be negative";
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16";
  if (p.head_dim < 16 || p.head_dim % 16 != 0) return "head_dim must be a multiple of 16";
  if (p.columns < int64_t{p.heads} * p.head_dim) return "the heads need more columns";
  if (p.columns % 8 != 0) return "columns must be a multiple of 8";
  if (!aligned16(p.x) || !aligned16(p.cos) || !aligned16(p.sin))
    return "arrays must be 16-byte aligned";
  return "";
}

void run(const RotaryForward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "rotary: ", why_not(p), "; got head_dim ", p.head_dim,
               ", columns ", p.columns);
  const int64_t items = int64_t{p.batch} * p.tokens * p.heads * (p.head_dim / 16);
  if (items == 0) return;
  forward_kernel<<<blocks_for(items), kThreads, 0, stream>>>(p, items);
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const RotaryBackward& p) {
  if (p.batch < 0 || p.tokens < 0 || p.q_heads < 0 || p.kv_heads < 0 || p.rest < 0)
    return "sizes must not be negative";
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16";
  if (p.head_dim < 16 || p.head_dim % 16 != 0) return "head_dim must be a multiple of 16";
  if (p.columns < (int64_t{p.q_heads} + 2 * p.kv_heads) * p.head_dim + p.rest)
    return "the heads and the rest need more columns";
  if (p.columns % 8 != 0 || !multiples_of_8(p.dq_stride) || !multiples_of_8(p.dk_stride) ||
      !multiples_of_8(p.dv_stride))
    return "columns and strides must be multiples of 8";
  for (const void* pointer : {p.dq, p.dk, p.dv, static_cast<const void*>(p.cos),
                              static_cast<const void*>(p.sin), static_cast<const void*>(p.dfused)})
    if (!aligned16(pointer)) return "arrays must be 16-byte aligned";
  return "";
}

void run(const RotaryBackward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "rotary: ", why_not(p), "; got head_dim ", p.head_dim,
               ", columns ", p.columns);
  const int64_t heads = int64_t{p.q_heads} + 2 * p.kv_heads;
  const int64_t per_row = heads * (p.head_dim / 16) + (p.columns - heads * p.head_dim) / 8;
  const int64_t items = int64_t{p.batch} * p.tokens * per_row;
  if (items == 0) return;
  backward_kernel<<<blocks_for(items), kThreads, 0, stream>>>(p, items);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
