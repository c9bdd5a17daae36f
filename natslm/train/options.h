// Everything a training run can be told, once: the command line, the checkpoint's trainer.json and
// the check that a resumed run is the same run all walk its fields (fields.h).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "natslm/train/fields.h"

namespace natslm::train {

// Values of --optimize.
inline constexpr const char* kJoint = "joint";
inline constexpr const char* kAlternating = "alternating";

struct Options {
  int64_t steps = 1000;
  int64_t batch = 16;
  int64_t micro_batch = 0;
  int64_t context = 512;
  double learning_rate = 1e-3;
  double role_rate = 1;
  double final_share = 0.1;
  int64_t warm_up = 100;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double decay = 0.1;
  double clip = 1.0;
  double lambda = 0.09;
  double kv_budget = 0;
  double control_gain = 0.05;
  double control_start = 0.01;
  std::string optimize = kJoint;
  double bias_range = 0;
  bool limit_factor = true;
  bool causal_normalizer = false;
  bool end_term = false;
  uint64_t seed = 1;
  int64_t log_every = 10;
  int64_t validate_every = 0;
  int64_t checkpoint_every = 200;
  int64_t keep_checkpoints = 2;
};

// Throws Error naming the first option that is out of range, its value and what is allowed.
void check(const Options& options);

// How for_each_field() finds the fields of Options.
constexpr auto fields_of(const Options&) {
  using enum Affects;
  using O = Options;
  return std::tuple{
      Field{"steps", &O::steps, kWeights, "optimiser steps"},
      Field{"batch", &O::batch, kWeights, "sequences a step"},
      Field{"micro-batch", &O::micro_batch, kWeights,
            "sequences in memory at once, their gradients are added up; 0: the whole batch"},
      Field{"context", &O::context, kWeights, "tokens a sequence"},
      Field{"lr", &O::learning_rate, kWeights, "highest learning rate"},
      Field{"role-lr", &O::role_rate, kWeights,
            "learning rate of the score layers (what makes the roles) / that of all other weights"},
      Field{"final-lr", &O::final_share, kWeights, "learning rate of the last step / highest"},
      Field{"warm-up", &O::warm_up, kWeights, "steps of linear rise at the start"},
      Field{"beta1", &O::beta1, kWeights, "AdamW: share of the old mean gradient kept each step"},
      Field{"beta2", &O::beta2, kWeights,
            "AdamW: share of the old mean squared gradient kept each step"},
      Field{"epsilon", &O::epsilon, kWeights,
            "AdamW: added to the root of the mean squared gradient"},
      Field{"decay", &O::decay, kWeights, "AdamW: weight decay, of matrices only"},
      Field{"clip", &O::clip, kWeights,
            "longest gradient (its norm over all weights); 0: no limit"},
      Field{"lambda", &O::lambda, kWeights, "price of memory, fixed; not used with --kv-budget"},
      Field{"kv-budget", &O::kv_budget, kWeights,
            "share of keys alive at the end of a text to aim at (0 to 1); 0: lambda is fixed"},
      Field{"control-gain", &O::control_gain, kWeights,
            "largest change of log(lambda) a step while aiming at --kv-budget"},
      Field{"control-start", &O::control_start, kWeights, "lambda at step 0 with --kv-budget"},
      Field{"optimize", &O::optimize, kWeights,
            "joint: all tokens train weights and roles; alternating: half of each batch the "
            "weights, the other half the roles"},
      Field{"bias-range", &O::bias_range, kWeights,
            "each sequence's Sliding logits are shifted by a number drawn up to this far from "
            "0, so that one model serves many budgets; 0: none are"},
      Field{"limit-factor", &O::limit_factor, kWeights,
            "gradient of the roles: no hidden pair counts more than a whole probability"},
      Field{"causal-normalizer", &O::causal_normalizer, kWeights,
            "gradient of the roles: probabilities over all keys before a query, not the live ones"},
      Field{"end-term", &O::end_term, kWeights,
            "gradient of the roles: a Global pays for the Locals it ends"},
      Field{"seed", &O::seed, kWeights, "of initial weights, data order and sampled roles"},
      Field{"log-every", &O::log_every, kFilesOnly, "steps between lines of the log"},
      Field{"validate-every", &O::validate_every, kFilesOnly,
            "steps between validations; 0: only at the end"},
      Field{"checkpoint-every", &O::checkpoint_every, kFilesOnly,
            "steps between checkpoints; 0: only at the end and on Ctrl-C"},
      Field{"keep-checkpoints", &O::keep_checkpoints, kFilesOnly,
            "newest checkpoints kept, at least 1"}};
}

}  // namespace natslm::train
