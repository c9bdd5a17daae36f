// Everything a training run can be told, once: the command line, the checkpoint's trainer.json and
// the check that a resumed run is the same run all walk for_each_field().
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

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

// What a field decides: the weights that come out (then a resumed run must have the same value), or
// only how often something is written.
enum class Affects : int8_t { kWeights, kFilesOnly };

// Calls visit(name, field, affects, help) for every field. `O` is Options or const Options.
template <class O, class Visit>
void for_each_field(O& o, Visit&& visit) {
  using enum Affects;
  visit("steps", o.steps, kWeights, "optimiser steps");
  visit("batch", o.batch, kWeights, "sequences a step");
  visit("micro-batch", o.micro_batch, kWeights,
        "sequences in memory at once, their gradients are added up; 0: the whole batch");
  visit("context", o.context, kWeights, "tokens a sequence");
  visit("lr", o.learning_rate, kWeights, "highest learning rate");
  visit("role-lr", o.role_rate, kWeights,
        "learning rate of the score layers (what makes the roles) / that of all other weights");
  visit("final-lr", o.final_share, kWeights, "learning rate of the last step / highest");
  visit("warm-up", o.warm_up, kWeights, "steps of linear rise at the start");
  visit("beta1", o.beta1, kWeights, "AdamW: share of the old mean gradient kept each step");
  visit("beta2", o.beta2, kWeights, "AdamW: share of the old mean squared gradient kept each step");
  visit("epsilon", o.epsilon, kWeights, "AdamW: added to the root of the mean squared gradient");
  visit("decay", o.decay, kWeights, "AdamW: weight decay, of matrices only");
  visit("clip", o.clip, kWeights, "longest gradient (its norm over all weights); 0: no limit");
  visit("lambda", o.lambda, kWeights, "price of memory, fixed; not used with --kv-budget");
  visit("kv-budget", o.kv_budget, kWeights,
        "share of keys alive at the end of a text to aim at (0 to 1); 0: lambda is fixed");
  visit("control-gain", o.control_gain, kWeights,
        "largest change of log(lambda) a step while aiming at --kv-budget");
  visit("control-start", o.control_start, kWeights, "lambda at step 0 with --kv-budget");
  visit("optimize", o.optimize, kWeights,
        "joint: all tokens train weights and roles; alternating: half of each batch the weights, "
        "the other half the roles");
  visit("bias-range", o.bias_range, kWeights,
        "each sequence's Sliding logits are shifted by a number drawn up to this far from 0, so "
        "that one model serves many budgets; 0: none are");
  visit("limit-factor", o.limit_factor, kWeights,
        "gradient of the roles: no hidden pair counts more than a whole probability");
  visit("causal-normalizer", o.causal_normalizer, kWeights,
        "gradient of the roles: probabilities over all keys before a query, not the live ones");
  visit("end-term", o.end_term, kWeights,
        "gradient of the roles: a Global pays for the Locals it ends");
  visit("seed", o.seed, kWeights, "of initial weights, data order and sampled roles");
  visit("log-every", o.log_every, kFilesOnly, "steps between lines of the log");
  visit("validate-every", o.validate_every, kFilesOnly,
        "steps between validations; 0: only at the end");
  visit("checkpoint-every", o.checkpoint_every, kFilesOnly,
        "steps between checkpoints; 0: only at the end and on Ctrl-C");
  visit("keep-checkpoints", o.keep_checkpoints, kFilesOnly, "newest checkpoints kept, at least 1");
}

}  // namespace natslm::train
