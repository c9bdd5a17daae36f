// The gated activation of a feed-forward block (Shazeer 2020, "GLU variants"), and the pass back
// from the input alone:
//
//   y[r][c] = activation(x[r][c]) * x[r][hidden + c]
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"

struct CUstream_st;

namespace natslm::kernels {

// kSilu: x / (1 + e^-x); kGelu: x * Phi(x); kGeluTanh: its approximation by a hyperbolic tangent
// (Hendrycks & Gimpel 2016).
enum class GateActivation : uint8_t { kSilu, kGelu, kGeluTanh };

struct GatedForward {
  int64_t rows = 0;
  int32_t hidden = 0;  // > 0
  GateActivation activation = GateActivation::kSilu;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [rows, 2 * hidden]: gates, then what they multiply
  void* y = nullptr;        // [rows, hidden]
};

struct GatedBackward {
  int64_t rows = 0;
  int32_t hidden = 0;  // > 0
  GateActivation activation = GateActivation::kSilu;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;   // [rows, 2 * hidden]
  const void* dy = nullptr;  // [rows, hidden]
  void* dx = nullptr;        // [rows, 2 * hidden]; may be x
};

namespace reference {
std::string_view why_not(const GatedForward&);  // "" means supported
void run(const GatedForward&);                  // double precision
std::string_view why_not(const GatedBackward&);
void run(const GatedBackward&);
}  // namespace reference

// bfloat16, hidden a multiple of 8, fewer than 2^34 numbers in y, arrays 16-byte aligned.
namespace cuda {
std::string_view why_not(const GatedForward&);
void run(const GatedForward&, CUstream_st* stream);
std::string_view why_not(const GatedBackward&);
void run(const GatedBackward&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::kernels
