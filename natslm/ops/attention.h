// Attention over keys with lifetimes as a differentiable LibTorch operator. Tensors in, tensors
// out; the arithmetic is in natslm/kernels. Registered as natslm::attention and
// natslm::attention_backward (schemas in attention.cc).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace natslm::ops {

// What roles add to a call (training only): the operator's gradient with respect to `onehot` is the
// three role sums of kernels/attention_backward.h.
struct RoleInputs {
  at::Tensor onehot;         // [B, Hkv, T, R] float; its values are read for `end_term` only
  at::Tensor horizons;       // [R, B, Hkv, T] int32
  bool limit_factor = true;  // method.md, "Gradient of the roles"
  bool causal_normalizer = false;
  // A Global pays for what the Locals it ends would have given until the Global after it. Needs
  // R = 3 with the horizons of Global, Local and Sliding window in this order.
  bool end_term = false;
};

struct AttentionResult {
  at::Tensor out;   // [B, Hq, T, D], dtype of q; in memory [B, T, Hq, D]
  at::Tensor lse;   // [B, Hq, T] float, not differentiable
  at::Tensor mass;  // [B, Hkv, T] float if asked for, else undefined; not differentiable
};

// q [B, Hq, T, D]; k, v [B, Hkv, T, D]; float32 or bfloat16, D a multiple of 8 up to 256, Hq a
// multiple of Hkv; any strides (a copy is made only if the last axis is not contiguous).
// last [B, Hkv, T] int32; lengths [B] int32 or absent (all T). `scale` defaults to 1 / sqrt(D).
// Differentiable in q, k, v and roles->onehot. Throws c10::Error naming the argument;
// Error for a length outside 0..T.
AttentionResult attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& last,
                          const std::optional<at::Tensor>& lengths = std::nullopt,
                          std::optional<double> scale = std::nullopt,
                          const std::optional<RoleInputs>& roles = std::nullopt,
                          bool want_mass = false);

}  // namespace natslm::ops
