// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/linear.h"

#include <ATen/ops/linear.h>

#include <optional>

namespace natslm::ops {

using at::Tensor;

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto product = [](const Tensor& a, const Tensor& w, const Tensor& b) {
    return at::linear(a, w, b.defined() ? std::optional(b.to(w.scalar_type())) : std::nullopt);
  };
  if (x.scalar_type() == weight.scalar_type()) return product(x, weight, bias);
  if (!x.is_cpu()) return product(x.to(weight.scalar_type()), weight, bias);
  return product(x, weight.to(x.scalar_type()), bias);
}

}  // namespace natslm::ops
