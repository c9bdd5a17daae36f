// Residual addition and normalisation in one pass over memory, and the pass back. The residual
// stream is float32, what enters and leaves matrix products is of `dtype`.
//
//   sum = x + branch,   y = (sum - mean) * rstd * weight        mean, variance over a row
//
// LayerNorm without bias (Ba et al. 2016), or with `centered` false RMSNorm (Zhang & Sennrich
// 2019): mean 0 and the mean square in place of the variance.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"

struct CUstream_st;

namespace natslm::kernels {

struct NormForward {
  int64_t rows = 0;
  int32_t width = 0;  // > 0
  float epsilon = 1e-5f;
  bool centered = true;
  DType dtype = DType::kFloat32;  // of branch and y

  const float* x = nullptr;       // [rows, width]
  const void* branch = nullptr;   // [rows, width]; null: nothing is added
  const float* weight = nullptr;  // [width]

  float* sum = nullptr;   // [rows, width]; may be x; not written (and may be null) without a branch
  void* y = nullptr;      // [rows, width]
  float* mean = nullptr;  // [rows]; 0 if not centered
  float* rstd = nullptr;  // [rows] 1 / sqrt(variance + epsilon)
};

struct NormBackward {
  int64_t rows = 0;
  int32_t width = 0;
  bool centered = true;
  DType dtype = DType::kFloat32;  // of dy and dbranch

  const float* sum = nullptr;        // [rows, width] as the forward pass normalised it
  const float* weight = nullptr;     // [width]
  const float* mean = nullptr;       // [rows]
  const float* rstd = nullptr;       // [rows]
  const void* dy = nullptr;          // [rows, width]
  const float* dresidual = nullptr;  // [rows, width] gradient of sum from its other reader; null: 0

  float* dx = nullptr;        // [rows, width] gradient of sum, which is x's; may be dresidual
  void* dbranch = nullptr;    // [rows, width] the same rounded to dtype; null: not wanted
  float* dweight = nullptr;   // [width]; null: not wanted
  bool accumulate = false;    // add to dweight what else is written to it
  void* workspace = nullptr;  // GPU: workspace_bytes(p) bytes, 256-byte aligned
};

namespace reference {
std::string_view why_not(const NormForward&);  // "" means supported
void run(const NormForward&);                  // double precision
std::string_view why_not(const NormBackward&);
void run(const NormBackward&);
}  // namespace reference

// bfloat16, width a multiple of 8 up to 8,192, arrays 16-byte aligned. Two runs agree bit for bit.
namespace cuda {
std::string_view why_not(const NormForward&);
void run(const NormForward&, CUstream_st* stream);
std::string_view why_not(const NormBackward&);
size_t workspace_bytes(const NormBackward&);
void run(const NormBackward&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::kernels
