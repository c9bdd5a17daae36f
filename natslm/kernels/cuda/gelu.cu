// Bound by memory: one 16-byte access of each array a thread.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/vectors.cuh"
#include "natslm/kernels/gelu.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float normal_distribution(float x) {
  return 0.5f * (1.0f + erff(x * 0.70710678118654752f));
}

__global__ void __launch_bounds__(kThreads)
    forward_kernel(const BFloat16* x, BFloat16* y, int64_t vectors) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= vectors) return;
  Floats8 v = load8(x + 8 * i);
#pragma unroll
  for (int e = 0; e < 8; ++e) v.v[e] *= normal_distribution(v.v[e]);
  store8(y + 8 * i, v);
}

__global__ void __launch_bounds__(kThreads)
    backward_kernel(const BFloat16* x, const BFloat16* dy, BFloat16* dx, BFloat16* y,
                    int64_t vectors) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const Floats8 v = load8(x + 8 * i), gradient = load8(dy + 8 * i);
  Floats8 out, derivative;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float value = v.v[e], phi = normal_distribution(value);
    const float density = 0.39894228040143268f * __expf(-0.5f * value * value);
    out.v[e] = value * phi;
    derivative.v[e] = gradient.v[e] * (phi + value * density);
  }
  store8(dx + 8 * i, derivative);
  if (y) store8(y + 8 * i, out);
}

template <class Params>
std::string_view why_not_shapes(const Params& p) {
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16";
  if (p.count < 0 || p.count % 8 != 0) return "count must be a multiple of 8";
  return "";
}

uint32_t blocks_for(int64_t count) {
  return static_cast<uint32_t>((count / 8 + kThreads - 1) / kThreads);
}

}  // namespace

std::string_view why_not(const GeluForward& p) {
  if (const auto reason = why_not_shapes(p); !reason.empty()) return reason;
  return aligned16(p.x) && aligned16(p.y) ? "" : "arrays must be 16-byte aligned";
}

void run(const GeluForward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "gelu: ", why_not(p), "; got ", p.count);
  if (p.count == 0) return;
  forward_kernel<<<blocks_for(p.count), kThreads, 0, stream>>>(
      static_cast<const BFloat16*>(p.x), static_cast<BFloat16*>(p.y), p.count / 8);
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const GeluBackward& p) {
  if (const auto reason = why_not_shapes(p); !reason.empty()) return reason;
  const bool aligned = aligned16(p.x) && aligned16(p.dy) && aligned16(p.dx) && aligned16(p.y);
  return aligned ? "" : "arrays must be 16-byte aligned";
}

void run(const GeluBackward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "gelu: ", why_not(p), "; got ", p.count);
  if (p.count == 0) return;
  backward_kernel<<<blocks_for(p.count), kThreads, 0, stream>>>(
      static_cast<const BFloat16*>(p.x), static_cast<const BFloat16*>(p.dy),
      static_cast<BFloat16*>(p.dx), static_cast<BFloat16*>(p.y), p.count / 8);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
