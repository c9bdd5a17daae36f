// The training loop: windows of a dataset -> model -> loss + lambda * price of memory -> AdamW,
// with a log, validation through a callback, and checkpoints from which a killed run continues bit
// for bit (with the same number of threads). Prints nothing: an Observer is told.
//
//   Trainer trainer(model, dataset, options, folder, parts);
//   if (resuming) trainer.resume(checkpoint);
//   const Result result = trainer.run();
//
// Everything random is a pure function of (seed, step, ...), so a run's state is the step, the
// weights, the optimiser's moments, and the budget control's three numbers.
//
// Files in `folder`: log.jsonl (a line a logged step, then one with the result), checkpoints/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "natslm/data/dataset.h"
#include "natslm/data/tokenizer.h"
#include "natslm/models/model.h"
#include "natslm/train/checkpoint.h"
#include "natslm/train/options.h"

namespace natslm::train {

// One step, or the mean over the steps since the last log line.
struct StepReport {
  int64_t step = 0;   // steps done, this one included
  double loss = 0;    // of the task, nats a token, without the price
  double lambda = 0;  // price of memory that was used; 0 for a dense model
  double learning_rate = 0;
  double gradient_norm = 0;  // before clipping
  models::Shares sampled;    // of the roles drawn
  double kv_end = 1;         // of argmax roles: what --kv-budget steers
  double tokens_per_s = 0;   // of the steps themselves: without validation, checkpoints, the log
  double seconds_left = 0;   // at the speed of this run so far
};

struct Validation {
  double perplexity = 0;
  models::Shares shares;  // of argmax roles
};

class Observer {
 public:
  virtual ~Observer() = default;
  virtual void on_step(const StepReport& report) { (void)report; }
  virtual void on_log(const StepReport& mean) { (void)mean; }
  virtual void on_validation(int64_t step, const Validation& validation) {
    (void)step, (void)validation;
  }
  virtual void on_checkpoint(int64_t step, const std::filesystem::path& path) {
    (void)step, (void)path;
  }
};

struct Result {
  bool stopped = false;  // by request, before the last step
  int64_t steps = 0, tokens = 0;
  double tokens_per_s = 0;
  double loss = 0;                              // mean of the last log interval
  std::optional<double> validation_perplexity;  // absent without a validation
  models::Shares shares;                        // of argmax roles: at validation, else in training
  double lambda = 0;
  int64_t peak_bytes = 0;  // most memory this process ever held
  int64_t peak_device_bytes =
      0;  // most memory of the GPU that its tensors ever took; 0 without one
};
nlohmann::ordered_json to_json(const Result& result);

// What a run may be given besides; all optional.
struct Parts {
  Observer* observer = nullptr;
  std::function<Validation()> validate;
  std::function<bool()> stop;                  // asked after each step: true means save and return
  const data::Tokenizer* tokenizer = nullptr;  // saved with every checkpoint
  // Kept in the checkpoints and required to be equal on resume: the text, the model's sizes, ...
  nlohmann::ordered_json identity;
  Checkpoints::Probe probe;
  bool graph = true;  // on a GPU: steps are recorded once and repeated; false: launched anew
};

class Steps;

class Trainer {
 public:
  // Model and dataset must outlive it. A model on a GPU (Model::to) is trained there. Throws Error
  // for options out of range, or a text shorter than one window.
  Trainer(models::Model& model, const data::TokenDataset& dataset, const Options& options,
          std::filesystem::path folder, Parts parts);
  ~Trainer();

  // Continues from this checkpoint: weights, optimiser, position. Throws Error if it is damaged or
  // an option that affects the weights differs from the checkpoint's.
  void resume(const std::filesystem::path& checkpoint);

  // Trains to the last step or until stopped. Throws Error at a loss, gradient or weight that is
  // not finite (naming step and tensor; the checkpoints before stay), or when a checkpoint cannot
  // be written.
  Result run();

  int64_t steps_done() const { return step_; }
  void observe(Observer* observer) { parts_.observer = observer; }

 private:
  StepReport finish_step();
  void save_checkpoint();
  bool stop_requested() const;

  models::Model& model_;
  const data::TokenDataset& dataset_;
  Options options_;
  std::filesystem::path folder_;
  Parts parts_;
  Checkpoints checkpoints_;
  std::unique_ptr<Steps> steps_;
  int64_t step_ = 0;         // steps done
  double step_seconds_ = 0;  // spent in steps, over all runs
  StepReport last_;          // the last log line's
};

// The folder of checkpoints inside a run's folder.
std::filesystem::path checkpoint_folder(const std::filesystem::path& run_folder);

// The options a checkpoint was made with.
Options options_of(const nlohmann::ordered_json& state);

}  // namespace natslm::train
