// Attention over keys with lifetimes as a differentiable LibTorch operator. Tensors in, tensors
// out; the arithmetic is in natslm/kernels. Registered as natslm::attention and
// natslm::attention_backward (schemas in attention.cc).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "natslm/kernels/crossover.h"

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

// What the GPU kernels need to turn sparsity into time; never changes a result beyond rounding, and
// the CPU kernels do without.
struct AttentionHints {
  // kernels::KeyOrder of `last`: order [B, Hkv, T] and ends [B, Hkv, 3], both int32 and on q's
  // device, or both undefined: keys are read in the order of their positions.
  at::Tensor order, ends;
  int32_t reach = 0;
  double density = 0.2;  // expected share of causal pairs that are visible
  // Undefined: by kernels/crossover.h. kLibrary only without `last`, for both passes.
  std::optional<kernels::AttentionPath> forward_path, backward_path;
};

struct AttentionResult {
  at::Tensor out;   // [B, Hq, T, D], dtype of q; in memory [B, T, Hq, D]
  at::Tensor lse;   // [B, Hq, T] float, not differentiable; undefined if a library kernel computed
  at::Tensor mass;  // [B, Hkv, T] float if asked for, else undefined; not differentiable
};

// q [B, Hq, T, D]; k, v [B, Hkv, T, D]; float32 or bfloat16, D a multiple of 8 up to 256, Hq a
// multiple of Hkv; any strides (a copy is made only if the last axis is not contiguous).
// last [B, Hkv, T] int32; lengths [B] int32 or absent (all T). `scale` defaults to 1 / sqrt(D).
// `last` undefined: every key is visible to every later query, and LibTorch's dense kernels may do
// it on a GPU (library_attention.h); `lse` is undefined then. A caller that knows this must say so
// here, since lifetimes on a GPU are not looked at.
// Differentiable in q, k, v and roles->onehot. Throws c10::Error naming the argument;
// Error for a length outside 0..T.
// On the GPU: bfloat16, at most 8 query heads a KV head (without `last` anything that
// LibTorch takes); lengths are not checked, since nothing waits for the device.
AttentionResult attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& last,
                          const std::optional<at::Tensor>& lengths = std::nullopt,
                          std::optional<double> scale = std::nullopt,
                          const std::optional<RoleInputs>& roles = std::nullopt,
                          bool want_mass = false, const AttentionHints& hints = {});

}  // namespace natslm::ops
