// The pass of assignment.h over tensors, differentiable: gradients reach the logits through
// `onehot` (straight-through) and through `price`.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "natslm/roles/roles.h"

namespace natslm::roles {

// What the noise of one layer hangs on; see gumbel.h.
struct Noise {
  uint64_t seed = 0;
  int64_t step = 0;
  int32_t layer = 0;
  int32_t first_head =
      0;  // where these KV heads begin among the layer's (not 0 if heads are sharded)
  at::Tensor sequences;  // [B] int64 ids of the texts; undefined: 0 .. B - 1
  // One int64 on the logits' device, or undefined. Read instead of `step` each time the kernels
  // run: a replayed CUDA graph draws the noise of the step it holds by then.
  at::Tensor device_step;
};

struct AssignedRoles {
  at::Tensor roles;     // [B, Hkv, T] int8
  at::Tensor last;      // [B, Hkv, T] int32; -1 past a length
  at::Tensor horizons;  // [kRoles, B, Hkv, T] int32: the lifetimes under each role
  at::Tensor onehot;    // [B, Hkv, T, kRoles] float, differentiable if noise is given
  at::Tensor price;     // 0-dim float: share of causal pairs alive, mean over B and Hkv; likewise
  at::Tensor shares;    // [B, Hkv, kShares] float, columns as enum Share of assignment.h
  // The keys in kernels::KeyOrder (kernels/attention_forward.h).
  at::Tensor order;  // [B, Hkv, T] int32; unspecified past a length
  at::Tensor ends;   // [B, Hkv, KeyOrder::kSegments] int32
  int32_t reach = 0;
};

// logits [B, T, kRoles * Hkv] (float32 or bfloat16), row kRoles * head + role; lengths [B] int32 or
// absent (all T). Without noise: argmax roles and no gradient. bias [B] float or undefined (0) is
// added to the Sliding logits. Throws c10::Error naming the argument.
//
// On a GPU (all tensors on the logits' device) the results stay there and nothing waits for it, so
// that lengths are not checked: one outside 0..T counts as the nearest of the two.
AssignedRoles assign_roles(const at::Tensor& logits, const Options& options,
                           const std::optional<at::Tensor>& lengths = std::nullopt,
                           const std::optional<Noise>& noise = std::nullopt,
                           const at::Tensor& bias = {});

}  // namespace natslm::roles
