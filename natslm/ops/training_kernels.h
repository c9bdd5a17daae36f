// The fused kernels of a training pass on tensors:
// kernels/{fused_norm,gelu,gated,rotary,cross_entropy}.h. A caller that writes its own gradients
// calls them, so they have no operator schema and no gradient of their own. On a GPU nothing waits;
// on the CPU the reference runs (for tests: plain and slow). Activations are float32 (CPU only) or
// bfloat16. Every function throws Error naming what does not fit. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "natslm/kernels/gated.h"

namespace natslm::ops {

struct NormOptions {
  double epsilon = 1e-5;
  bool centered = true;  // LayerNorm; false: RMSNorm
};

struct Normed {
  at::Tensor sum;         // [N, width] float: x + branch; x itself without a branch
  at::Tensor y;           // [N, width] of `dtype`
  at::Tensor mean, rstd;  // [N] float
};

// x [N, width] float, branch [N, width] of `dtype` or undefined, weight [width] float; contiguous.
Normed norm(const at::Tensor& x, const at::Tensor& branch, const at::Tensor& weight,
            const NormOptions& options, at::ScalarType dtype);

// Gradient of a norm. dy [N, width]; dsum [N, width] float: the gradient of sum from its other
// reader, undefined: none. `dx` [N, width] float, which may be dsum, becomes the gradient of x;
// returns the same rounded to dy's type. dweight [width] float is written (or added to), unless
// undefined.
at::Tensor norm_backward(const Normed& forward, const at::Tensor& weight,
                         const NormOptions& options, const at::Tensor& dy, const at::Tensor& dsum,
                         const at::Tensor& dx, const at::Tensor& dweight, bool accumulate);

at::Tensor gelu(const at::Tensor& x);
// Overwrites dy with the gradient of x; returns gelu(x) if `want_y`, else an undefined tensor.
at::Tensor gelu_backward_(const at::Tensor& x, const at::Tensor& dy, bool want_y);

// x [.., 2 * hidden]: activation of the first half times the second -> [.., hidden]; dy [..,
// hidden]
// -> [.., 2 * hidden].
at::Tensor gated(const at::Tensor& x, kernels::GateActivation activation);
at::Tensor gated_backward(const at::Tensor& x, const at::Tensor& dy,
                          kernels::GateActivation activation);

// fused [B, T, columns] contiguous: turns its first `heads` heads in place. cos, sin [>= T, D/2].
void rotate_heads_(const at::Tensor& fused, int64_t heads, const at::Tensor& cos,
                   const at::Tensor& sin);
// dq [B, Hq, T, D], dk, dv [B, Hkv, T, D] of turned heads (any strides with contiguous channels),
// drest [B, T, rest] float or undefined -> [B, T, columns].
at::Tensor rotate_heads_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                                 const at::Tensor& drest, int64_t columns, const at::Tensor& cos,
                                 const at::Tensor& sin);

// logits [N, columns] contiguous with `vocabulary` <= columns, targets [N] int32. Returns the
// losses [N] float; with a gradient, each row of logits becomes `weight` (times its own of
// `weights` [N] float, if defined) times the derivative of its loss.
at::Tensor cross_entropy_rows_(const at::Tensor& logits, const at::Tensor& targets,
                               int64_t vocabulary, bool gradient, double weight,
                               const at::Tensor& weights = {});

}  // namespace natslm::ops
