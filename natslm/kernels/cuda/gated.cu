// Bound by memory: one 16-byte access of each array a thread.
// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "natslm/base/error.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/vectors.cuh"
#include "natslm/kernels/gated.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int kThreads = 256;

struct Activated {
  float value, derivative;
};

template <GateActivation kActivation>
__device__ Activated activated(float x) {
  if constexpr (kActivation == GateActivation::kSilu) {
    const float s = __fdividef(1.0f, 1.0f + __expf(-x));
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (kActivation == GateActivation::kGelu) {
    const float phi = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    return {x * phi, phi + x * 0.39894228040143268f * __expf(-0.5f * x * x)};
  } else {
    constexpr float kScale = 0.79788456080286536f, kCubic = 0.044715f;
    const float t = tanhf(kScale * (x + kCubic * x * x * x));
    return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kScale *
                                                           (1.0f + 3.0f * kCubic * x * x)};
  }
}

// Where vector i of y, 8 numbers, has its gates.
__device__ int64_t gate_of(uint32_t i, uint32_t vectors_of_row) {
  const uint32_t row = i / vectors_of_row;
  return (int64_t{row} * vectors_of_row + i) * 8;
}

template <GateActivation kActivation>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const BFloat16* x, BFloat16* y, uint32_t vectors, uint32_t vectors_of_row) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const BFloat16* from = x + gate_of(i, vectors_of_row);
  const Floats8 gate = load8(from), times = load8(from + int64_t{8} * vectors_of_row);
  Floats8 out;
#pragma unroll
  for (int e = 0; e < 8; ++e) out.v[e] = activated<kActivation>(gate.v[e]).value * times.v[e];
  store8(y + int64_t{8} * i, out);
}

template <GateActivation kActivation>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const BFloat16* x, const BFloat16* dy, BFloat16* dx, uint32_t vectors,
                    uint32_t vectors_of_row) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const int64_t at = gate_of(i, vectors_of_row), second = at + int64_t{8} * vectors_of_row;
  const Floats8 gate = load8(x + at), times = load8(x + second), d = load8(dy + int64_t{8} * i);
  Floats8 dgate, dtimes;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const Activated a = activated<kActivation>(gate.v[e]);
    dgate.v[e] = d.v[e] * times.v[e] * a.derivative;
    dtimes.v[e] = d.v[e] * a.value;
  }
  store8(dx + at, dgate);
  store8(dx + second, dtimes);
}

template <class Params>
std::string_view why_not_shapes(const Params& p) {
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16";
  if (p.rows < 0) return "rows must not be negative";
  if (p.hidden < 1 || p.hidden % 8 != 0) return "hidden must be a multiple of 8";
  if (p.rows > (int64_t{1} << 31) / (p.hidden / 8)) return "y must have fewer than 2^34 numbers";
  return "";
}

template <class Params>
uint32_t vectors_of(const Params& p) {
  return static_cast<uint32_t>(p.rows * (p.hidden / 8));
}

// Calls launch(activation as a constant).
template <class Launch>
void with_activation(GateActivation activation, const Launch& launch) {
  using enum GateActivation;
  switch (activation) {
    case kSilu:
      return launch(std::integral_constant<GateActivation, kSilu>());
    case kGelu:
      return launch(std::integral_constant<GateActivation, kGelu>());
    case kGeluTanh:
      return launch(std::integral_constant<GateActivation, kGeluTanh>());
  }
  fail("gated activation ", static_cast<int>(activation), " is not known");
}

}  // namespace

std::string_view why_not(const GatedForward& p) {
  if (const auto reason = why_not_shapes(p); !reason.empty()) return reason;
  return aligned16(p.x) && aligned16(p.y) ? "" : "arrays must be 16-byte aligned";
}

void run(const GatedForward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "gated: ", why_not(p), "; got ", p.rows, " rows of ", p.hidden);
  if (p.rows == 0) return;
  const uint32_t vectors = vectors_of(p);
  with_activation(p.activation, [&](auto activation) {
    forward_kernel<activation()><<<(vectors + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        static_cast<const BFloat16*>(p.x), static_cast<BFloat16*>(p.y), vectors, p.hidden / 8);
  });
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const GatedBackward& p) {
  if (const auto reason = why_not_shapes(p); !reason.empty()) return reason;
  const bool aligned = aligned16(p.x) && aligned16(p.dy) && aligned16(p.dx);
  return aligned ? "" : "arrays must be 16-byte aligned";
}

void run(const GatedBackward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "gated: ", why_not(p), "; got ", p.rows, " rows of ", p.hidden);
  if (p.rows == 0) return;
  const uint32_t vectors = vectors_of(p);
  with_activation(p.activation, [&](auto activation) {
    backward_kernel<activation()><<<(vectors + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        static_cast<const BFloat16*>(p.x), static_cast<const BFloat16*>(p.dy),
        static_cast<BFloat16*>(p.dx), vectors, p.hidden / 8);
  });
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
