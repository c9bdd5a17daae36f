// Everything a fine-tuning run can be told, once: the command line, the checkpoint and the check
// that a resumed run is the same run all walk its fields (fields.h). Recipes are named sets of
// values.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <tuple>

#include "natslm/roles/roles.h"
#include "natslm/train/fields.h"

namespace natslm::train {

// What is learned: score layers, or as a control a low-rank addition to the attention's outputs
// that has as many numbers and evicts nothing.
inline constexpr const char* kRolesMethod = "roles";
inline constexpr const char* kAdapterMethod = "adapter";

// Values of --loss. The dense model is the same one with every key alive.
inline constexpr const char* kCrossEntropy = "ce";
inline constexpr const char* kToDense = "kl";              // KL(dense || with roles)
inline constexpr const char* kBothLosses = "both";         // the sum of the two
inline constexpr const char* kHiddenError = "hidden-mse";  // of what the output matrix reads

struct FinetuneOptions {
  std::string method = kRolesMethod;
  std::string loss = kCrossEntropy;
  int64_t steps = 1350;
  int64_t batch = 8;
  int64_t micro_batch = 0;
  int64_t context = 2048;
  std::string roles = "gls";
  int64_t window = 64;
  int64_t role_chunk = 1;
  double learning_rate = 0.01;
  double final_share = 0.05;
  int64_t warm_up = 20;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double decay = 0;
  double clip = 1.0;
  double pairs = 0;
  double lambda = 0;
  double control_gain = 0.05;
  double control_start = 0.01;
  double bias_range = 8;
  double price_slope = 0.25;
  bool recompute = false;
  uint64_t seed = 1;
  int64_t log_every = 10;
  int64_t checkpoint_every = 100;
};

// Throws Error naming the first option that is out of range, its value and what is allowed.
void check(const FinetuneOptions& options);

// The share of pairs to aim at where none is given: what the window keeps anyway, and of the rest
// as much as was found to serve budgets from 50 to 6 % at W = 64 (docs/finetune.md).
double default_pairs(const FinetuneOptions& options);

// The options for the score layers that are added.
roles::Options role_options(const FinetuneOptions& options);

struct FinetuneRecipe {
  std::string_view name, description;
  FinetuneOptions options;
  std::string_view mix;  // kind of training texts (data/recall_tasks.h): "mixed" or "passkeys"
};
std::span<const FinetuneRecipe> finetune_recipes();
const FinetuneRecipe& finetune_recipe(std::string_view name);  // throws Error listing what there is

// How for_each_field() finds the fields of FinetuneOptions.
constexpr auto fields_of(const FinetuneOptions&) {
  using enum Affects;
  using O = FinetuneOptions;
  return std::tuple{
      Field{"method", &O::method, kWeights,
            "roles: score layers; adapter: a control that evicts nothing, a low-rank addition "
            "to the attention's outputs with as many numbers"},
      Field{"loss", &O::loss, kWeights,
            "ce: cross-entropy; kl: divergence from the dense model; both: their sum; "
            "hidden-mse: error of the last hidden states"},
      Field{"steps", &O::steps, kWeights, "optimiser steps"},
      Field{"batch", &O::batch, kWeights, "texts a step"},
      Field{"micro-batch", &O::micro_batch, kWeights,
            "texts in memory at once, their gradients are added up; 0: the whole batch"},
      Field{"context", &O::context, kWeights, "tokens a text"},
      Field{"roles", &O::roles, kWeights, "roles a token may have: gls, gs or gl"},
      Field{"window", &O::window, kWeights, "tokens a Sliding token lives"},
      Field{"role-chunk", &O::role_chunk, kWeights, "tokens that share a role"},
      Field{"lr", &O::learning_rate, kWeights, "highest learning rate"},
      Field{"final-lr", &O::final_share, kWeights, "learning rate of the last step / highest"},
      Field{"warm-up", &O::warm_up, kWeights, "steps of linear rise at the start"},
      Field{"beta1", &O::beta1, kWeights, "AdamW: share of the old mean gradient kept each step"},
      Field{"beta2", &O::beta2, kWeights,
            "AdamW: share of the old mean squared gradient kept each step"},
      Field{"decay", &O::decay, kWeights, "AdamW: weight decay"},
      Field{"clip", &O::clip, kWeights, "longest gradient; 0: no limit"},
      Field{"pairs", &O::pairs, kWeights,
            "share of pairs of query and key alive to aim at, drawn biases included; 0: the "
            "window's and 19 % of the others"},
      Field{"lambda", &O::lambda, kWeights, "price of memory, fixed; 0: steered towards --pairs"},
      Field{"control-gain", &O::control_gain, kWeights,
            "largest change of log(lambda) a step while aiming at --pairs"},
      Field{"control-start", &O::control_start, kWeights,
            "lambda at step 0 while aiming at --pairs"},
      Field{"bias-range", &O::bias_range, kWeights,
            "each text's Sliding logits are shifted by a number drawn up to this far from 0, so "
            "that one side-car serves many budgets; 0: none are"},
      Field{"price-slope", &O::price_slope, kWeights,
            "a text whose Sliding logits are shifted by b pays e^(slope * b) times the price, "
            "so that a shift means another price of memory; 0: all pay the same"},
      Field{"recompute", &O::recompute, kFilesOnly,
            "make each layer's activations again in the backward pass: less memory, more time"},
      Field{"seed", &O::seed, kWeights, "of initial weights, texts and sampled roles"},
      Field{"log-every", &O::log_every, kFilesOnly, "steps between lines of the log"},
      Field{"checkpoint-every", &O::checkpoint_every, kFilesOnly,
            "steps between checkpoints; 0: only on Ctrl-C"}};
}

}  // namespace natslm::train
