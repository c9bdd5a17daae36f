// Teaches a frozen model: score layers (or, as a control, adapters) are all that changes. Texts ->
// model -> loss + lambda * price of memory -> AdamW, with a log, checkpoints from which a stopped
// run continues, and at the end how many keys the roles keep at each budget bias. Prints nothing.
//
//   FineTuner tuner(model, samples, options, folder, parts);
//   const FinetuneResult result = tuner.run();
//   models::write_side_car(path, tuner.side_car(...));
//
// Everything random is a pure function of (seed, step, ...), so a run's state is the step, the
// learned weights, the optimiser's moments and the budget control's three numbers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>

#include "natslm/models/model.h"
#include "natslm/models/side_car.h"
#include "natslm/roles/budget_control.h"
#include "natslm/train/adamw.h"
#include "natslm/train/checkpoint.h"
#include "natslm/train/finetune_options.h"
#include "natslm/train/trainer.h"

namespace natslm::train {

// Text number `number` of a run: tokens [T + 1], and what the prediction of tokens[i + 1] from
// those before counts in the loss, weights [T], at least 0. A pure function of the number.
using TextSamples =
    std::function<void(int64_t number, std::span<int32_t> tokens, std::span<float> weights)>;

struct FinetuneParts {
  // StepReport::kv_end is that of argmax roles without bias; `sampled` has the biases drawn.
  std::function<void(const StepReport&)> on_step;
  std::function<bool()> stop;  // asked after each step: true means save and return
  // Kept in the checkpoints and required to be equal on resume: the model, the texts.
  std::string identity;
};

struct FinetuneResult {
  bool stopped = false;
  int64_t steps = 0, tokens = 0;
  double seconds = 0;  // of the steps
  double loss = 0;     // mean of the last log interval
  double pairs = 1;    // likewise
  double lambda = 0;
  int64_t learned_numbers = 0;
  int64_t peak_device_bytes = 0;
};
nlohmann::ordered_json to_json(const FinetuneResult& result);

// Adds adapters with at least as many numbers as score layers would have, as parameters that learn.
// Throws Error if the architecture cannot take them.
void add_adapters(models::Model& model, uint64_t seed);

class FineTuner {
 public:
  // The model has score layers of role_options(options), or adapters; it must outlive this.
  // `folder` is for log and checkpoints. Throws Error for options out of range.
  FineTuner(models::Model& model, TextSamples samples, const FinetuneOptions& options,
            std::filesystem::path folder, FinetuneParts parts);

  // Continues from the newest checkpoint in the folder; false if there is none. Throws Error if it
  // is damaged or another run's.
  bool resume();
  int64_t steps_done() const { return step_; }

  // Trains to the last step or until stopped. Throws Error at a loss, gradient or weight that is
  // not finite (naming step and tensor; the checkpoints before stay).
  FinetuneResult run();

  // Milliseconds of a forward and backward pass of one batch with every key alive and nothing to
  // learn, the fastest of some: what fine-tuning is measured against.
  double dense_step_ms(int64_t repeats);

 private:
  StepReport step(int64_t index);
  void add_part(int64_t step, int64_t first, int64_t count, const at::Tensor& tokens,
                const at::Tensor& weights, double total_weight, StepReport& report);
  void save_checkpoint();

  models::Model& model_;
  TextSamples samples_;
  FinetuneOptions options_;
  std::filesystem::path folder_;
  FinetuneParts parts_;
  models::NamedTensors learned_;
  AdamW optimizer_;
  std::optional<roles::BudgetControl> control_;
  Checkpoints checkpoints_;
  int64_t step_ = 0;
  double seconds_ = 0;
  StepReport last_;
};

// Share of keys that argmax roles keep at each budget bias, and each layer's part of them, measured
// on `count` texts of `context` tokens: `texts` [count * context] ids, one after the other.
roles::Calibration calibrate(models::Model& model, std::span<const int32_t> texts, int64_t context,
                             std::span<const float> biases,
                             const std::function<void(int64_t done, int64_t total)>& progress = {});

// Biases from -range to range that a calibration asks for, 0 among them.
std::vector<float> calibration_biases(double range, int64_t count);

}  // namespace natslm::train
