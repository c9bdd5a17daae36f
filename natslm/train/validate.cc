// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/validate.h"

#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"
#include "natslm/models/training_pass.h"
#include "natslm/roles/assignment.h"
#include "natslm/train/cross_entropy.h"

namespace natslm::train {

namespace {

// Writes `rows` windows, numbers first .. of `count` spread evenly over the text, as int32.
at::Tensor spread_windows(const data::TokenDataset& dataset, int64_t context, int64_t first,
                          int64_t rows, int64_t count) {
  at::Tensor ids = at::empty({rows, context + 1}, at::kInt);
  for (int64_t r = 0; r < rows; ++r)
    dataset.window((first + r) * dataset.windows(context) / count, context,
                   ids.mutable_data_ptr<int32_t>() + r * (context + 1));
  return ids;
}

// By the model's written-out pass in bfloat16, which is what a training step there computes.
Validation validate_on_device(models::Model& model, const data::TokenDataset& dataset,
                              int64_t context, int64_t batch, int64_t count) {
  const auto pass = model.training_pass(at::kBFloat16);
  double loss = 0;
  Validation result;
  result.shares = {0, 0, 0};
  for (int64_t first = 0; first < count; first += batch) {
    const int64_t rows = std::min(batch, count - first);
    const at::Tensor ids = spread_windows(dataset, context, first, rows, count);
    const auto [lowest, highest] = at::aminmax(ids);
    NATSLM_CHECK(lowest.item<int>() >= 0 && highest.item<int>() < model.config().vocabulary,
                 "the validation text has tokens outside the model's vocabulary of ",
                 model.config().vocabulary);
    const at::Tensor windows = ids.to(model.device());
    models::TrainingInput input;
    input.tokens = windows.slice(1, 0, context).contiguous();
    input.sample = false;
    const models::PassOutput output = pass->loss(input, windows.slice(1, 1).contiguous());
    loss += output.loss.item<double>();
    const at::Tensor shares =
        output.shares.defined() ? output.shares.cpu() : at::ones({roles::kShares}, at::kDouble);
    const double* share = shares.const_data_ptr<double>();
    const double weight = static_cast<double>(rows) / static_cast<double>(count);
    result.shares.pairs += weight * share[roles::kPairs];
    result.shares.kv_end += weight * share[roles::kKvEnd];
    result.shares.kv_mean += weight * share[roles::kKvMean];
  }
  result.perplexity = std::exp(loss / static_cast<double>(count * context));
  return result;
}

}  // namespace

Validation validate(models::Model& model, const data::TokenDataset& dataset, int64_t context,
                    int64_t batch, int64_t windows) {
  const c10::NoGradGuard no_grad;
  const int64_t available = dataset.windows(context);
  NATSLM_CHECK(available > 0, "the validation text has ", dataset.tokens(),
               " tokens, fewer than one window of ", context + 1, "; give more");
  const int64_t count = windows > 0 ? std::min(windows, available) : available;
  if (!model.device().is_cpu()) return validate_on_device(model, dataset, context, batch, count);
  double loss = 0;
  Validation result;
  result.shares = {0, 0, 0};
  for (int64_t first = 0; first < count; first += batch) {
    const int64_t rows = std::min(batch, count - first);
    const at::Tensor tokens = spread_windows(dataset, context, first, rows, count).to(at::kLong);
    models::TrainingInput input;
    input.tokens = tokens.slice(1, 0, context).contiguous();
    input.sample = false;
    const models::TrainingOutput output = model.forward(input);
    loss += cross_entropy(output.logits, tokens.slice(1, 1));
    const double share = static_cast<double>(rows) / static_cast<double>(count);
    result.shares.pairs += share * output.sampled.pairs;
    result.shares.kv_end += share * output.sampled.kv_end;
    result.shares.kv_mean += share * output.sampled.kv_mean;
  }
  result.perplexity = std::exp(loss / static_cast<double>(count * context));
  return result;
}

}  // namespace natslm::train
