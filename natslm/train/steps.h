// How a trainer takes its steps: with autograd, one after the other (autograd_steps.cc), or on a
// device with written-out gradients, the next one queued while the last one runs (device_steps.h).
// Both take the same steps, up to rounding, and keep the same state.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "natslm/data/dataset.h"
#include "natslm/models/model.h"
#include "natslm/roles/budget_control.h"
#include "natslm/train/adamw.h"
#include "natslm/train/options.h"
#include "natslm/train/trainer.h"

namespace natslm::train {

struct FinishedStep {
  StepReport report;    // seconds_left is the trainer's
  double seconds = 0;   // that it took
  bool failed = false;  // loss or gradient is not finite; the weights are as before the step
  std::optional<NonFinite> bad;  // the first tensor found that is not finite
};

class Steps {
 public:
  Steps(models::Model& model, const Options& options);
  virtual ~Steps() = default;

  // Begins step number `step` (0-based), the one after the last that began. At most ahead() steps
  // before it may be unfinished.
  virtual void begin(int64_t step) = 0;
  // The oldest step that began and is not finished yet; waits for it.
  virtual FinishedStep finish() = 0;
  virtual int64_t ahead() const = 0;

  // State; only while no step is unfinished.
  AdamW& optimizer() { return optimizer_; }
  virtual double lambda() const = 0;  // of the next step
  virtual std::optional<roles::BudgetControl::State> control()
      const = 0;  // absent: lambda is fixed
  virtual void restore_control(const roles::BudgetControl::State& state) = 0;
  // Most memory of the device's own that was ever in use; 0: it has none.
  virtual int64_t peak_device_bytes() const { return 0; }

 protected:
  bool dense() const;
  // Absent if lambda is fixed.
  std::optional<roles::BudgetOptions> budget() const;
  double learning_rate(int64_t step) const;
  // What all parts of a step have in common.
  models::TrainingInput role_input(int64_t step) const;

  models::Model& model_;
  Options options_;
  AdamW optimizer_;
};

std::unique_ptr<Steps> make_autograd_steps(models::Model& model, const data::TokenDataset& dataset,
                                           const Options& options);

}  // namespace natslm::train
