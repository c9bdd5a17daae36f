// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/budget_control.h"

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"

namespace natslm::roles {

BudgetControl::BudgetControl(const BudgetOptions& options) : options_(options) {
  NATSLM_CHECK(options.target > 0 && options.target <= 1, "KV budget ", options.target,
               " is not a share of the keys; give a number above 0 and at most 1");
  NATSLM_CHECK(options.initial_lambda > 0, "initial lambda ", options.initial_lambda,
               " must be positive");
  NATSLM_CHECK(options.gain > 0, "gain of the budget control ", options.gain, " must be positive");
  NATSLM_CHECK(options.smoothing >= 0 && options.smoothing < 1, "smoothing of the budget control ",
               options.smoothing, " must be at least 0 and below 1");
  state_.log_lambda = std::log(options.initial_lambda);
}

double BudgetControl::lambda() const {
  return std::exp(state_.log_lambda);
}

double BudgetControl::measured() const {
  if (state_.steps == 0) return options_.target;
  return state_.average / (1 - std::pow(options_.smoothing, static_cast<double>(state_.steps)));
}

void BudgetControl::observe(double kv_end) {
  state_.average = options_.smoothing * state_.average + (1 - options_.smoothing) * kv_end;
  ++state_.steps;
  const double error = (measured() - options_.target) / options_.target;
  state_.log_lambda = std::clamp(state_.log_lambda + options_.gain * std::clamp(error, -1.0, 1.0),
                                 kMinLogLambda, kMaxLogLambda);
}

}  // namespace natslm::roles
