// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/device_budget.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/zeros.h>

namespace natslm::train {

using roles::BudgetControl;

DeviceBudget::DeviceBudget(const roles::BudgetOptions& options, c10::Device device)
    : options_(options),
      state_(at::zeros({3}, at::TensorOptions().dtype(at::kDouble).device(device))) {
  restore(BudgetControl(options).state());
}

at::Tensor DeviceBudget::lambda() const {
  return state_[0].exp();
}

void DeviceBudget::observe(const at::Tensor& kv_end) {
  at::Tensor log_lambda = state_[0], average = state_[1], steps = state_[2];
  average.mul_(options_.smoothing).add_(kv_end, 1 - options_.smoothing);
  steps.add_(1);
  const at::Tensor measured = average / (1 - at::pow(options_.smoothing, steps));
  const at::Tensor error = ((measured - options_.target) / options_.target).clamp(-1, 1);
  log_lambda.add_(error, options_.gain).clamp_(roles::kMinLogLambda, roles::kMaxLogLambda);
}

BudgetControl::State DeviceBudget::state() const {
  const at::Tensor host = state_.cpu();
  const double* x = host.const_data_ptr<double>();
  return {.log_lambda = x[0], .average = x[1], .steps = static_cast<int64_t>(x[2])};
}

void DeviceBudget::restore(const BudgetControl::State& state) {
  at::Tensor host = at::empty({3}, at::kDouble);
  double* x = host.mutable_data_ptr<double>();
  x[0] = state.log_lambda;
  x[1] = state.average;
  x[2] = static_cast<double>(state.steps);
  state_.copy_(host);
}

}  // namespace natslm::train
