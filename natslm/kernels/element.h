// Reading and writing single elements of arrays whose type is known at run time: for the reference
// and for tests, where clarity counts and speed does not.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/dtype.h"
#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels {

inline double load(const void* array, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(array)[index];
  return static_cast<float>(static_cast<const BFloat16*>(array)[index]);
}

// Rounds once (twice for bf16: the second rounding is of a float).
inline void store(void* array, DType dtype, int64_t index, double value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(array)[index] = static_cast<float>(value);
  } else {
    static_cast<BFloat16*>(array)[index] = BFloat16(static_cast<float>(value));
  }
}

// Index of the first channel of token t.
inline int64_t row(const Strides& stride, int64_t batch, int64_t head, int64_t t) {
  return batch * stride.batch + head * stride.head + t * stride.token;
}

inline int32_t length_of(const int32_t* lengths, int32_t batch, int32_t tokens) {
  return lengths ? lengths[batch] : tokens;
}

}  // namespace natslm::kernels
