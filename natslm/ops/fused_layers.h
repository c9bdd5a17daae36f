// Pieces of a transformer block that know their gradients, each one pass over memory forward and
// one back (training_kernels.h). As operations of LibTorch the same take three to ten passes: a
// pass forward and back through a frozen SmolLM2-135M (8 x 2,048 tokens, one H200) took 93 ms with
// them, and 40 with these and the fused cross-entropy.
//
// Activations are float32 (CPU only, where the double-precision reference runs: for tests) or
// bfloat16; the residual stream is float32. Every function throws Error naming what does not fit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "natslm/ops/training_kernels.h"

namespace natslm::ops {

struct SumAndNorm {
  at::Tensor sum;  // [.., width] float: x + branch
  at::Tensor y;    // [.., width] of the branch's type: sum normed
};
// x [.., width] float, branch the same of `dtype` or undefined, weight [width] float, which is
// taken to be frozen. Differentiable in x and branch.
SumAndNorm add_norm(const at::Tensor& x, const at::Tensor& branch, const at::Tensor& weight,
                    const NormOptions& options, at::ScalarType dtype);

struct TurnedHeads {
  at::Tensor q, k, v;  // [B, H, T, D], in memory [B, T, columns]
};
// fused [B, T, (q_heads + 2 kv_heads) * D] contiguous: its query and key heads are turned in place,
// so nobody else may read it. cos, sin [>= T, D/2] float. Differentiable in fused.
TurnedHeads turn_heads(const at::Tensor& fused, int64_t q_heads, int64_t kv_heads,
                       const at::Tensor& cos, const at::Tensor& sin);

// x [.., 2 * hidden] -> activation(first half) * second half [.., hidden]. Differentiable.
at::Tensor gated_activation(const at::Tensor& x, kernels::GateActivation activation);

}  // namespace natslm::ops
