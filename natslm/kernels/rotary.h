// Rotary position embedding (Su et al. 2021) inside the fused projection of a training pass: heads
// are turned where they are, attention reads them there with strides, and the pass back gathers the
// gradients of all heads into the gradient of the projection.
//
// The channel pairs (c, c + D/2) of token t's head are turned by the angle t * base^(-2c/D).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"
#include "natslm/kernels/attention_forward.h"

struct CUstream_st;

namespace natslm::kernels {

struct RotaryForward {
  int32_t batch = 0, tokens = 0, heads = 0, head_dim = 0;  // B, T, H, D (even)
  DType dtype = DType::kFloat32;
  void* x = nullptr;  // [B, T, columns]: the first H * D columns are turned, the others stay
  int64_t columns = 0;
  const float* cos = nullptr;  // [T or more, D/2]
  const float* sin = nullptr;  // likewise
};

struct RotaryBackward {
  int32_t batch = 0, tokens = 0, q_heads = 0, kv_heads = 0, head_dim = 0;  // B, T, Hq, Hkv, D
  DType dtype = DType::kFloat32;
  const void* dq = nullptr;  // [B, Hq, T, D] gradient of the turned heads
  const void* dk = nullptr;  // [B, Hkv, T, D] likewise
  const void* dv = nullptr;  // [B, Hkv, T, D]
  Strides dq_stride, dk_stride, dv_stride;
  const float* drest = nullptr;  // [B, T, rest] gradient of what follows the heads
  int32_t rest = 0;
  const float* cos = nullptr;  // as above
  const float* sin = nullptr;
  void* dfused = nullptr;  // [B, T, columns]: query heads, key heads, values, rest, zeros
  int64_t columns = 0;     // at least (Hq + 2 Hkv) * D + rest
};

namespace reference {
std::string_view why_not(const RotaryForward&);  // "" means supported
void run(const RotaryForward&);                  // double precision
std::string_view why_not(const RotaryBackward&);
void run(const RotaryBackward&);
}  // namespace reference

// bfloat16, D a multiple of 16, columns and strides multiples of 8, arrays 16-byte aligned.
namespace cuda {
std::string_view why_not(const RotaryForward&);
void run(const RotaryForward&, CUstream_st* stream);
std::string_view why_not(const RotaryBackward&);
void run(const RotaryBackward&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::kernels
