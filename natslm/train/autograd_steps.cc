// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <chrono>
#include <cmath>
#include <utility>
#include <vector>

#include "natslm/train/cross_entropy.h"
#include "natslm/train/schedule.h"
#include "natslm/train/step_plan.h"
#include "natslm/train/steps.h"

namespace natslm::train {

Steps::Steps(models::Model& model, const Options& options)
    : model_(model),
      options_(options),
      optimizer_(model.parameters(), {options.beta1, options.beta2, options.epsilon, options.decay},
                 [&](std::string_view name) {
                   return models::is_score_layer(name) ? options.role_rate : 1.0;
                 }) {}

bool Steps::dense() const {
  return model_.config().roles.set == roles::RoleSet::kDense;
}

std::optional<roles::BudgetOptions> Steps::budget() const {
  if (options_.kv_budget <= 0 || dense()) return std::nullopt;
  return roles::BudgetOptions{.target = options_.kv_budget,
                              .initial_lambda = options_.control_start,
                              .gain = options_.control_gain};
}

double Steps::learning_rate(int64_t step) const {
  return options_.learning_rate *
         schedule(step, options_.steps, options_.warm_up, options_.final_share);
}

models::TrainingInput Steps::role_input(int64_t step) const {
  models::TrainingInput input;
  input.seed = options_.seed;
  input.step = step;
  input.role_gradient = {.limit_factor = options_.limit_factor,
                         .causal_normalizer = options_.causal_normalizer,
                         .end_term = options_.end_term};
  return input;
}

namespace {

class AutogradSteps : public Steps {
 public:
  AutogradSteps(models::Model& model, const data::TokenDataset& dataset, const Options& options)
      : Steps(model, options), dataset_(dataset), parts_(parts_of(options)) {
    if (const auto b = budget()) control_.emplace(*b);
    for (const auto& [name, parameter] : model.parameters())
      (models::is_score_layer(name) ? scores_ : weights_).push_back(parameter);
  }

  void begin(int64_t step) override {
    const auto begin = std::chrono::steady_clock::now();
    FinishedStep done{.report = {.sampled = {0, 0, 0}, .kv_end = 0}};
    StepReport& report = done.report;
    report.step = step + 1;
    report.lambda = lambda();
    report.learning_rate = learning_rate(step);
    optimizer_.zero_gradients();
    for (const Part& part : parts_) add_part(step, part, report);
    report.loss /= static_cast<double>(options_.batch * options_.context);
    report.gradient_norm = gradient_norm(model_.parameters());
    if (!std::isfinite(report.loss) || !std::isfinite(report.gradient_norm)) {
      done.bad = find_non_finite(model_.parameters());
      // Otherwise only the norm's sum of squares overflowed.
      done.failed = done.bad || !std::isfinite(report.loss);
    }
    if (!done.failed) {
      const bool clip = options_.clip > 0 && report.gradient_norm > options_.clip;
      optimizer_.step(report.learning_rate, clip ? report.gradient_norm / options_.clip : 1.0);
      if (control_) control_->observe(report.kv_end);
    }
    done.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    report.tokens_per_s = static_cast<double>(options_.batch * options_.context) / done.seconds;
    done_ = done;
  }

  FinishedStep finish() override { return std::exchange(done_, {}); }
  int64_t ahead() const override { return 0; }

  double lambda() const override {
    if (dense()) return 0;
    return control_ ? control_->lambda() : options_.lambda;
  }
  std::optional<roles::BudgetControl::State> control() const override {
    return control_ ? std::optional(control_->state()) : std::nullopt;
  }
  void restore_control(const roles::BudgetControl::State& state) override {
    if (control_) control_->restore(state);
  }

 private:
  // Gradients of one part; its loss (a sum) and shares go into the report.
  void add_part(int64_t step, const Part& part, StepReport& report) {
    const at::Tensor windows = at::empty({part.count, options_.context + 1}, at::kInt);
    models::TrainingInput input = role_input(step);
    input.sequences = at::empty({part.count}, at::kLong);
    auto* sequences = input.sequences.mutable_data_ptr<int64_t>();
    dataset_.fill_samples(step * options_.batch + part.first, part.count, options_.context,
                          windows.mutable_data_ptr<int32_t>(), sequences);
    if (options_.bias_range > 0) {
      input.biases = at::empty({part.count}, at::kFloat);
      for (int64_t i = 0; i < part.count; ++i)
        input.biases.mutable_data_ptr<float>()[i] =
            drawn_bias(options_.seed, step, sequences[i], options_.bias_range);
    }
    const at::Tensor ids = windows.to(at::kLong);
    input.tokens = ids.slice(1, 0, options_.context).contiguous();
    input.learn_roles = part.scores;
    const models::TrainingOutput output = model_.forward(input);

    const at::Tensor gradient = output.logits.detach().contiguous();
    report.loss += cross_entropy_to_gradient(gradient, ids.slice(1, 1), part.loss_weight);
    // Backward from the logits with that gradient and from the price with its weight: the same as
    // from the sum, without keeping probabilities beside the logits.
    torch::autograd::variable_list roots = {output.logits}, gradients = {gradient};
    if (part.scores && output.price.defined() && output.price.requires_grad()) {
      roots.push_back(output.price);
      gradients.push_back(at::full_like(output.price.detach(), report.lambda * part.price_share));
    }
    torch::autograd::variable_list only;  // none: all weights
    if (!part.scores) only = weights_;
    if (!part.weights) only = scores_;
    torch::autograd::backward(roots, gradients, std::nullopt, /*create_graph=*/false, only);

    const double share = static_cast<double>(part.count) / static_cast<double>(options_.batch);
    report.sampled.pairs += share * output.sampled.pairs;
    report.sampled.kv_end += share * output.sampled.kv_end;
    report.sampled.kv_mean += share * output.sampled.kv_mean;
    report.kv_end += share * output.argmax_kv_end;
  }

  const data::TokenDataset& dataset_;
  std::vector<Part> parts_;
  torch::autograd::variable_list weights_, scores_;
  std::optional<roles::BudgetControl> control_;
  FinishedStep done_;
};

}  // namespace

std::unique_ptr<Steps> make_autograd_steps(models::Model& model, const data::TokenDataset& dataset,
                                           const Options& options) {
  return std::make_unique<AutogradSteps>(model, dataset, options);
}

}  // namespace natslm::train
