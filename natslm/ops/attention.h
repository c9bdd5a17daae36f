// Attention over keys with lifetimes as a differentiable LibTorch operator. Tensors in, tensors out;
// the arithmetic is in natslm/kernels. Registered as natslm::attention (see attention.cc for schemas).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace natslm::ops {

// What roles add to a call (training only): the operator's gradient with respect to `onehot` is the
// three role sums of kernels/attention_backward.h.
struct RoleInputs {
  at::Tensor onehot;           // [B, Hkv, T, R] float; its values are not read
  at::Tensor horizons;         // [R, B, Hkv, T] int32
  bool limit_factor = true;    // method.md, "Gradient of the roles"
  bool causal_normalizer = false;
  bool end_term = false;       // needs roles G, L, S in this order (R = 3)
};

struct AttentionResult {
  at::Tensor out;   // [B, Hq, T, D], dtype of q
  at::Tensor lse;   // [B, Hq, T] float, not differentiable
  at::Tensor mass;  // [B, Hkv, T] float if asked for, else undefined; not differentiable
};

// q [B, Hq, T, D]; k, v [B, Hkv, T, D]; float32 or bfloat16, last axis contiguous, D a multiple of 8 up
// to 256, Hq a multiple of Hkv. last [B, Hkv, T] int32; lengths [B] int32 or absent (all T). `scale`
// defaults to 1 / sqrt(D). Throws c10::Error naming the argument.
AttentionResult attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& last,
                          const std::optional<at::Tensor>& lengths = std::nullopt,
                          std::optional<double> scale = std::nullopt,
                          const std::optional<RoleInputs>& roles = std::nullopt,
                          bool want_mass = false);

}  // namespace natslm::ops
