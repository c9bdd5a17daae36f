// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>

#include <optional>

#include "natslm/kernels/few_rows_linear.h"
#include "natslm/ops/parallel.h"

namespace natslm::ops {
namespace {

using at::Tensor;

Tensor few_rows(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  Tensor out = at::empty({rows.size(0), weight.size(0)}, rows.options());
  kernels::FewRowsLinear p;
  p.rows = rows.size(0);
  p.in = rows.size(1);
  p.out_size = weight.size(0);
  p.x = rows.const_data_ptr<float>();
  p.weight = static_cast<const BFloat16*>(weight.const_data_ptr());
  p.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  p.out = out.mutable_data_ptr<float>();
  p.parallel = torch_threads();
  kernels::cpu::run(p);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return out.view(shape);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto product = [](const Tensor& a, const Tensor& w, const Tensor& b) {
    return at::linear(a, w, b.defined() ? std::optional(b.to(w.scalar_type())) : std::nullopt);
  };
  if (x.scalar_type() == weight.scalar_type()) return product(x, weight, bias);
  if (!x.is_cpu()) return product(x.to(weight.scalar_type()), weight, bias);
  const bool fits = x.scalar_type() == at::kFloat && weight.scalar_type() == at::kBFloat16 &&
                    weight.is_contiguous() && x.size(-1) == weight.size(1) &&
                    (!bias.defined() || (bias.scalar_type() == at::kFloat && bias.is_contiguous()));
  const bool learns = c10::GradMode::is_enabled() && x.requires_grad();
  if (fits && !learns && x.numel() > 0 && x.numel() / x.size(-1) <= kernels::kFewRows)
    return few_rows(x, weight, bias);
  return product(x, weight.to(x.scalar_type()), bias);
}

}  // namespace natslm::ops
