// Rotary position embedding (Su et al. 2021): channel pairs (c, c + D/2) of a head are turned by
// position * base^(-2c/D), the half-split layout of Hugging Face. Pretrained models may bring other
// frequencies (rope.h).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "natslm/models/rope.h"

namespace natslm::models {

// The heads of one fused projection, keys and queries turned to their positions.
struct Heads {
  at::Tensor q;     // [B, Hq, T, D] with contiguous channels
  at::Tensor k, v;  // [B, Hkv, T, D] likewise
  at::Tensor rest;  // [B, T, columns beyond the heads]
};

class Rotary {
 public:
  // Positions 0 .. context - 1 of heads of head_dim channels (even).
  Rotary(int32_t head_dim, double base, int32_t context);
  // With these frequencies, at most D/2, for the first pairs; the other pairs stay as they are.
  Rotary(int32_t head_dim, const RopeFrequencies& frequencies, int32_t context);

  void to(c10::Device device);
  bool turns() const { return turns_; }           // false: without a single frequency
  const at::Tensor& cos() const { return cos_; }  // [context, D/2] float
  const at::Tensor& sin() const { return sin_; }

  // fused [B, T, (q_heads + 2 kv_heads) * D + rest]: q, k, v head by head, then anything else;
  // token t is at position t. Differentiable. May turn the heads in place: nobody else may read
  // `fused`.
  Heads split_heads(const at::Tensor& fused, int32_t q_heads, int32_t kv_heads) const;

  // x [n, H, D] turned to the positions [n] (int32). No gradient. Throws Error for a position
  // outside (of positions on a GPU the caller has made sure: looking would wait for the device).
  at::Tensor rotate(const at::Tensor& x, const at::Tensor& positions) const;

 private:
  int32_t head_dim_, context_;
  bool turns_ = true;
  at::Tensor cos_, sin_;  // [context, D/2] float
};

}  // namespace natslm::models
