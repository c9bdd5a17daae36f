// GELU with the exact normal distribution (Hendrycks & Gimpel 2016): y = x * Phi(x), and the pass
// back from x alone, which can give y once more so that it need not be kept.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"

struct CUstream_st;

namespace natslm::kernels {

struct GeluForward {
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [count]
  void* y = nullptr;        // [count]; may be x
};

struct GeluBackward {
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;   // [count]
  const void* dy = nullptr;  // [count]
  void* dx = nullptr;        // [count]; may be dy
  void* y = nullptr;         // [count] as the forward pass writes it; null: not wanted
};

namespace reference {
std::string_view why_not(const GeluForward&);  // "" means supported
void run(const GeluForward&);                  // double precision
std::string_view why_not(const GeluBackward&);
void run(const GeluBackward&);
}  // namespace reference

// bfloat16, count a multiple of 8, arrays 16-byte aligned.
namespace cuda {
std::string_view why_not(const GeluForward&);
void run(const GeluForward&, CUstream_st* stream);
std::string_view why_not(const GeluBackward&);
void run(const GeluBackward&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::kernels
