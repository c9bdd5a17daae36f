// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/adamw.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "natslm/base/error.h"

namespace natslm::train {

AdamW::AdamW(const models::NamedTensors& parameters, const AdamWOptions& options,
             const RateFactor& rate_factor)
    : options_(options) {
  for (const auto& [name, parameter] : parameters) {
    NATSLM_CHECK(parameter.scalar_type() == at::kFloat, "parameter ", name, " is ",
                 c10::toString(parameter.scalar_type()), "; training needs float32");
    Group& group =
        group_of(parameter.dim() >= 2 ? options.decay : 0, rate_factor ? rate_factor(name) : 1);
    group.parameters.push_back(parameter);
    group.means.push_back(at::zeros_like(parameter.detach()));
    group.squares.push_back(at::zeros_like(parameter.detach()));
    state_.emplace_back("mean." + name, group.means.back());
    state_.emplace_back("square." + name, group.squares.back());
  }
  NATSLM_ASSERT(!parameters.empty());
  steps_ = at::full({}, 0.0f, parameters.front().second.options().requires_grad(false));
}

AdamW::Group& AdamW::group_of(double decay, double rate_factor) {
  for (Group& group : groups_)
    if (group.decay == decay && group.rate_factor == rate_factor) return group;
  groups_.emplace_back().decay = decay;
  groups_.back().rate_factor = rate_factor;
  return groups_.back();
}

AdamW::Active AdamW::active(const Group& group) const {
  Active a;
  for (size_t i = 0; i < group.parameters.size(); ++i) {
    const at::Tensor& gradient = group.parameters[i].grad();
    if (!gradient.defined()) continue;
    a.parameters.push_back(group.parameters[i]);
    a.gradients.push_back(gradient);
    a.means.push_back(group.means[i]);
    a.squares.push_back(group.squares[i]);
    a.steps.push_back(steps_);
  }
  return a;
}

void AdamW::step(double learning_rate, double gradient_divisor) {
  const c10::NoGradGuard no_grad;
  steps_.add_(1);
  for (const Group& group : groups_) {
    const Active a = active(group);
    if (a.parameters.empty()) continue;
    std::optional<at::Tensor> scale;
    if (gradient_divisor != 1)
      scale = at::full({}, gradient_divisor, a.gradients.front().options().dtype(at::kFloat));
    at::_fused_adamw_(a.parameters, a.gradients, a.means, a.squares, {}, a.steps,
                      learning_rate * group.rate_factor, options_.beta1, options_.beta2,
                      group.decay, options_.epsilon, /*amsgrad=*/false, /*maximize=*/false, scale);
  }
}

void AdamW::step_on_device(const at::Tensor& learning_rate, const at::Tensor& gradient_divisor,
                           const at::Tensor& skip) {
  const c10::NoGradGuard no_grad;
  steps_.add_(1);
  for (const Group& group : groups_) {
    const Active a = active(group);
    if (a.parameters.empty()) continue;
    const at::Tensor rate =
        group.rate_factor == 1 ? learning_rate : learning_rate * group.rate_factor;
    at::_fused_adamw_(a.parameters, a.gradients, a.means, a.squares, {}, a.steps, rate,
                      options_.beta1, options_.beta2, group.decay, options_.epsilon,
                      /*amsgrad=*/false, /*maximize=*/false, gradient_divisor, skip);
  }
}

void AdamW::zero_gradients() {
  // Dropped, not filled with zeros: the next backward pass then hands its own buffers over.
  for (Group& group : groups_)
    for (at::Tensor& parameter : group.parameters) parameter.mutable_grad() = at::Tensor();
}

int64_t AdamW::steps() const {
  return steps_.item<int64_t>();
}

models::NamedTensors AdamW::state() const {
  return state_;
}

void AdamW::set_steps(int64_t steps) {
  steps_.fill_(static_cast<double>(steps));
}

double gradient_norm(const models::NamedTensors& parameters) {
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  for (const auto& [name, parameter] : parameters)
    if (parameter.grad().defined()) gradients.push_back(parameter.grad());
  if (gradients.empty()) return 0;
  return at::stack(at::_foreach_norm(gradients)).to(at::kDouble).norm().item<double>();
}

std::optional<NonFinite> find_non_finite(const models::NamedTensors& parameters) {
  const c10::NoGradGuard no_grad;
  for (const bool gradients : {false, true}) {
    for (const auto& [name, parameter] : parameters) {
      const at::Tensor values = gradients ? parameter.grad() : parameter;
      if (values.defined() && !at::isfinite(values).all().item<bool>())
        return NonFinite{name, gradients};
    }
  }
  return std::nullopt;
}

}  // namespace natslm::train
