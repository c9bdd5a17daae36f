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
};

struct AssignedRoles {
  at::Tensor roles;     // [B, Hkv, T] int8
  at::Tensor last;      // [B, Hkv, T] int32; -1 past a length
  at::Tensor horizons;  // [kRoles, B, Hkv, T] int32: the lifetimes under each role
  at::Tensor onehot;    // [B, Hkv, T, kRoles] float, differentiable if noise is given
  at::Tensor price;     // 0-dim float: share of causal pairs alive, mean over B and Hkv; likewise
  at::Tensor shares;    // [B, Hkv, kShares] float, columns as enum Share of assignment.h
};

// logits [B, T, kRoles * Hkv] (float32 or bfloat16), row kRoles * head + role; lengths [B] int32 or
// absent (all T). Without noise: argmax roles and no gradient. bias [B] float or undefined (0) is
// added to the Sliding logits. Throws c10::Error naming the argument.
AssignedRoles assign_roles(const at::Tensor& logits, const Options& options,
                           const std::optional<at::Tensor>& lengths = std::nullopt,
                           const std::optional<Noise>& noise = std::nullopt,
                           const at::Tensor& bias = {});

}  // namespace natslm::roles
