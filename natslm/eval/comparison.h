// Policies side by side. A fair table gives each the same share of keys: what counts is the share
// that was measured, so budgets are set by measuring, not by trusting a policy's own arithmetic.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "natslm/eval/perplexity.h"
#include "natslm/models/model.h"
#include "natslm/policies/key_cap.h"
#include "natslm/policies/policies.h"

namespace natslm::eval {

// One line of a table: a policy on a model.
struct Contender {
  std::string spec;
  models::Model* model = nullptr;
  // KV at end to set the policy to (learned roles: spec_under_budget), as a share or as a number of
  // keys at the end of a full window. Neither: as the spec says. `full` has none.
  policies::KeyBudget budget;
};

// What policies are told of a model. `context` 0: the model's.
policies::PolicyContext policy_context(const models::Model& model, int32_t context = 0,
                                       uint64_t seed = 0, at::ScalarType cache_dtype = at::kFloat);

// Whether a budget can be set: by a count of keys, or by the bias of learned roles.
bool has_budget(std::string_view spec);

// The spec set so that its KV at end, measured on some full windows of these streams, is as near to
// `budget` as it gets (within 1 % where the policy can be set so finely). Throws Error for a policy
// without a budget and for a budget that is out of its reach, naming what it can reach.
std::string spec_at_budget(models::Model& model, std::string_view spec, double budget,
                           const Streams& streams, const PerplexityOptions& options,
                           uint64_t seed = 0);

// Learned roles that never pass `budget` (policies/demotion.h), with a bias that by itself keeps
// about the share `kv_end` at the end: the spec's own, the calibration's, or one measured on these
// streams; 0 if they are too short to measure on. `calibration` may be null. Throws Error as
// spec_at_budget does, but not for a share that no bias reaches.
std::string spec_under_budget(models::Model& model, std::string_view spec,
                              const policies::KeyBudget& budget, double kv_end,
                              const Streams& streams, const PerplexityOptions& options,
                              uint64_t seed = 0, const roles::Calibration* calibration = nullptr);

// A budget as a share of the keys of so many tokens, at most 1; 0: none.
double share_of(const policies::KeyBudget& budget, const models::Model& model, int32_t tokens);

// What a comparison does with a contender: runs the policy on the model and says which share of
// the keys it kept at the end of texts of the full length, as measured.
using Evaluate = std::function<double(models::Model& model, std::unique_ptr<cache::Policy> policy)>;

// Each contender in turn, its budget set first, on full windows of `streams`: texts like those that
// `evaluate` reads. Of `options`, context, chunk and type of the cache should be the evaluation's.
void evaluate_each(const std::vector<Contender>& contenders, const Streams& streams,
                   const PerplexityOptions& options, uint64_t seed, const Evaluate& evaluate);

// The table of the front page: `full` on `rival_model`, the ceiling; `learned` on the model with
// roles; then `rivals` on `rival_model`, each at the share of keys that was measured for `learned`,
// which is returned.
double evaluate_at_equal_budget(models::Model& model, const std::string& learned,
                                models::Model& rival_model, const std::vector<std::string>& rivals,
                                const Streams& streams, const PerplexityOptions& options,
                                uint64_t seed, const Evaluate& evaluate);

// The same two with perplexity, on the streams themselves. `on_result` is called as each is done.
std::vector<PerplexityResult> compare(
    const std::vector<Contender>& contenders, const Streams& streams,
    const PerplexityOptions& options, uint64_t seed = 0,
    const std::function<void(const PerplexityResult&)>& on_result = {},
    const Progress& progress = {});

std::vector<PerplexityResult> compare_at_equal_budget(
    models::Model& model, const std::string& learned, models::Model& rival_model,
    const std::vector<std::string>& rivals, const Streams& streams,
    const PerplexityOptions& options, uint64_t seed = 0,
    const std::function<void(const PerplexityResult&)>& on_result = {},
    const Progress& progress = {});

}  // namespace natslm::eval
