// roles::BudgetControl with its state in device memory, so that a step's price follows from the
// step before without a look from the host: the same rule, as operations on 0-dim double tensors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "natslm/roles/budget_control.h"

namespace natslm::train {

class DeviceBudget {
 public:
  DeviceBudget(const roles::BudgetOptions& options, c10::Device device);

  at::Tensor lambda() const;  // 0-dim double, of the next step
  // As BudgetControl::observe. kv_end is 0-dim double on the device.
  void observe(const at::Tensor& kv_end);

  roles::BudgetControl::State state() const;  // waits for the device
  void restore(const roles::BudgetControl::State& state);

 private:
  roles::BudgetOptions options_;
  at::Tensor state_;  // [3] double: log lambda, average, steps
};

}  // namespace natslm::train
