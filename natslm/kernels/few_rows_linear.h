// Contract: a few rows of float32 times a bf16 matrix, float32 out: the matrix products of a decode
// step on the CPU, whose time is that of reading the matrix once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"
#include "natslm/base/parallel.h"

namespace natslm::kernels {

//   out[r][o] = bias[o] + sum over i of x[r][i] * weight[o][i]
struct FewRowsLinear {
  int64_t rows = 0, in = 0, out_size = 0;
  const float* x = nullptr;          // [rows, in]
  const BFloat16* weight = nullptr;  // [out_size, in]
  const float* bias = nullptr;       // [out_size] or null: 0
  float* out = nullptr;              // [rows, out_size]
  ParallelFor parallel;
};

namespace reference {
std::string_view why_not(const FewRowsLinear&);  // "" means supported
void run(const FewRowsLinear&);                  // sums in double precision
}  // namespace reference

// Any sizes; meant for up to kFewRows rows, beyond which widening the matrix for a full product is
// faster. The result does not depend on the number of threads, nor that of a row on the others.
inline constexpr int64_t kFewRows = 12;
namespace cpu {
std::string_view why_not(const FewRowsLinear&);
void run(const FewRowsLinear&);
}  // namespace cpu

}  // namespace natslm::kernels
