// Steers the price of memory, lambda, so that the share of keys alive meets a target: dual ascent
// on log lambda. Pure state and arithmetic; the training loop feeds it once a step.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace natslm::roles {

// Beyond these lambda has no further effect; bounds keep a target out of reach from winding it up.
inline constexpr double kMinLogLambda = -14, kMaxLogLambda = 5;

struct BudgetOptions {
  double target = 0.1;           // KV at end to reach, in (0, 1]
  double initial_lambda = 0.01;  // > 0
  double gain = 0.05;            // of log lambda a step at an error of 100 % of the target
  double smoothing = 0.9;        // weight of the past in the measured share, in [0, 1)
};

class BudgetControl {
 public:
  // All of its memory: save it with the checkpoint, and the steered run resumes bit for bit.
  struct State {
    double log_lambda = 0;
    double average = 0;  // exponential, biased towards 0 in the first steps
    int64_t steps = 0;
  };

  // Throws Error for options out of range.
  explicit BudgetControl(const BudgetOptions& options);

  double lambda() const;
  // The smoothed measurement; the target before the first one.
  double measured() const;
  // The share of keys alive in this step: log lambda moves by gain * (measured - target) / target,
  // at most by the gain.
  void observe(double kv_end);

  const State& state() const { return state_; }
  void restore(const State& state) { state_ = state; }

 private:
  BudgetOptions options_;
  State state_;
};

}  // namespace natslm::roles
