// x times a weight matrix [out, in], whatever the two are stored as.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace natslm::ops {

// x [..., in], weight [out, in], bias [out] or undefined -> [..., out]. Of one type: LibTorch's
// own. A bf16 weight with float32 x: on the CPU the result is float32 (the weight's numbers are
// widened, nothing else is rounded); on a GPU x is rounded and the result bf16. Differentiable in
// x.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

}  // namespace natslm::ops
