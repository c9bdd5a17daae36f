// Dense causal attention by LibTorch's own kernels (cuDNN, FlashAttention), for calls of
// ops::attention in which every key is visible.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "natslm/ops/attention.h"

namespace natslm::ops {

// Whether LibTorch's kernels serve a call without `last`, roles and mass: on a GPU, by
// kernels/crossover.h, or because no kernel here takes its type or shape. With lengths only then:
// LibTorch's kernels read rows past a length. hints.forward_path decides alone if given.
bool library_serves(const at::Tensor& q, const at::Tensor& k,
                    const std::optional<at::Tensor>& lengths, const AttentionHints& hints);

// q [B, Hq, T, D]; k, v [B, Hkv, T, D]; lengths [B] int32 or absent. Returns [B, Hq, T, D] in the
// memory order of q, 0 past a length. Differentiable; cuDNN's gradients may differ in their last
// bits from run to run. Keys of a group are not copied.
at::Tensor library_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const std::optional<at::Tensor>& lengths, double scale);

}  // namespace natslm::ops
