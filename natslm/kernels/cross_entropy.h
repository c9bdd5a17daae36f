// Cross-entropy of rows of logits, and its gradient in their place: called for some thousand rows
// at a time, it leaves no tensor of tokens x vocabulary anywhere.
//
//   loss_r = log(sum_v exp(logits[r][v])) - logits[r][target_r]
//   logits[r][v] <- weight * weights_r * (softmax(logits[r])[v] - [v = target_r])
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"

struct CUstream_st;

namespace natslm::kernels {

struct CrossEntropy {
  int64_t rows = 0;
  int32_t vocabulary = 0;  // > 0
  int32_t columns = 0;     // of a row in memory, >= vocabulary; what is beyond it is not read
  DType dtype = DType::kFloat32;
  void* logits = nullptr;            // [rows, columns]
  const int32_t* targets = nullptr;  // [rows]; outside the vocabulary: that loss is not a number
  float* loss = nullptr;             // [rows]
  bool gradient = true;  // false: logits stay; true: overwritten, zeros beyond the vocabulary
  float weight = 1;
  const float* weights = nullptr;  // [rows]; null: 1
};

namespace reference {
std::string_view why_not(const CrossEntropy&);  // "" means supported
void run(const CrossEntropy&);                  // double precision
}  // namespace reference

// bfloat16, columns a multiple of 8, logits 16-byte aligned. Two runs agree bit for bit.
namespace cuda {
std::string_view why_not(const CrossEntropy&);
void run(const CrossEntropy&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::kernels
