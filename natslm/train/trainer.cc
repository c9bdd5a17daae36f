// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/trainer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <c10/core/GradMode.h>
#include <sys/resource.h>
#include <torch/csrc/autograd/autograd.h>

#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/models/models.h"
#include "natslm/models/safetensors.h"
#include "natslm/train/cross_entropy.h"
#include "natslm/train/run_log.h"
#include "natslm/train/schedule.h"

namespace natslm::train {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

constexpr int kStateVersion = 1;

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

int64_t peak_bytes() {
  struct rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

Json to_json(const Options& options) {
  Json json = Json::object();
  for_each_field(options, [&](const char* name, const auto& value, Affects, const char*) {
    json[name] = value;
  });
  return json;
}

// Means of what the steps since the last log line reported.
class Mean {
 public:
  void add(const StepReport& r) {
    ++count_;
    sum_.loss += r.loss;
    sum_.gradient_norm += r.gradient_norm;
    sum_.kv_end += r.kv_end;
    sum_.sampled.pairs += r.sampled.pairs;
    sum_.sampled.kv_end += r.sampled.kv_end;
    sum_.sampled.kv_mean += r.sampled.kv_mean;
    last_ = r;
  }
  int64_t count() const { return count_; }
  StepReport take() {
    StepReport mean = last_;
    const double n = static_cast<double>(std::max<int64_t>(count_, 1));
    mean.loss = sum_.loss / n;
    mean.gradient_norm = sum_.gradient_norm / n;
    mean.kv_end = sum_.kv_end / n;
    mean.sampled = {sum_.sampled.pairs / n, sum_.sampled.kv_end / n, sum_.sampled.kv_mean / n};
    *this = {};
    return mean;
  }

 private:
  int64_t count_ = 0;
  StepReport sum_{.sampled = {0, 0, 0}, .kv_end = 0};
  StepReport last_;
};

}  // namespace

Json to_json(const Result& r) {
  return {
      {"steps", r.steps},
      {"tokens", r.tokens},
      {"tokens_per_s", r.tokens_per_s},
      {"loss", r.loss},
      {"validation_perplexity", r.validation_perplexity ? Json(*r.validation_perplexity) : Json()},
      {"kv_end", r.shares.kv_end},
      {"kv_mean", r.shares.kv_mean},
      {"pairs", r.shares.pairs},
      {"lambda", r.lambda},
      {"peak_bytes", r.peak_bytes}};
}

fs::path checkpoint_folder(const fs::path& run_folder) {
  return run_folder / "checkpoints";
}

Options options_of(const Json& state) {
  Options options;
  try {
    for_each_field(options, [&](const char* name, auto& value, Affects, const char*) {
      value = state.at("options").at(name).get<std::decay_t<decltype(value)>>();
    });
  } catch (const nlohmann::json::exception&) {
    fail("the checkpoint's options are not those of this version; start the run again");
  }
  return options;
}

Trainer::Trainer(models::Model& model, const data::TokenDataset& dataset, const Options& options,
                 fs::path folder, Parts parts)
    : model_(model),
      dataset_(dataset),
      options_((check(options), options)),
      folder_(std::move(folder)),
      parts_(std::move(parts)),
      checkpoints_(checkpoint_folder(folder_), options.keep_checkpoints, parts_.probe),
      optimizer_(model.parameters(), {options.beta1, options.beta2, options.epsilon, options.decay},
                 [&](std::string_view name) {
                   return models::is_score_layer(name) ? options.role_rate : 1.0;
                 }) {
  NATSLM_CHECK(dataset_.windows(options_.context) > 0, "the text has ", dataset_.tokens(),
               " tokens, fewer than one window of ", options_.context + 1,
               "; give more text or a shorter --context");
  NATSLM_CHECK(options_.context <= model_.config().context, "--context is ", options_.context,
               "; the model was built for at most ", model_.config().context);
  if (options_.kv_budget > 0 && model_.config().roles.set != roles::RoleSet::kDense)
    control_.emplace(roles::BudgetOptions{.target = options_.kv_budget,
                                          .initial_lambda = options_.control_start,
                                          .gain = options_.control_gain});
}

double Trainer::lambda() const {
  if (model_.config().roles.set == roles::RoleSet::kDense) return 0;
  return control_ ? control_->lambda() : options_.lambda;
}

bool Trainer::stop_requested() const {
  return parts_.stop && parts_.stop();
}

StepReport Trainer::step() {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t micro = options_.micro_batch > 0 ? options_.micro_batch : options_.batch;
  const int64_t parts = options_.batch / micro;
  const int64_t tokens = options_.batch * options_.context;
  StepReport report{.sampled = {0, 0, 0}, .kv_end = 0};
  report.lambda = lambda();
  report.learning_rate = options_.learning_rate *
                         schedule(step_, options_.steps, options_.warm_up, options_.final_share);
  optimizer_.zero_gradients();
  double loss = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const at::Tensor windows = at::empty({micro, options_.context + 1}, at::kInt);
    models::TrainingInput input;
    input.sequences = at::empty({micro}, at::kLong);
    dataset_.fill_samples(step_ * options_.batch + part * micro, micro, options_.context,
                          windows.mutable_data_ptr<int32_t>(),
                          input.sequences.mutable_data_ptr<int64_t>());
    const at::Tensor ids = windows.to(at::kLong);
    input.tokens = ids.slice(1, 0, options_.context).contiguous();
    input.seed = options_.seed;
    input.step = step_;
    const models::TrainingOutput output = model_.forward(input);

    const at::Tensor gradient = output.logits.detach().contiguous();
    loss += cross_entropy_to_gradient(gradient, ids.slice(1, 1), 1.0 / static_cast<double>(tokens));
    // Backward from the logits with that gradient and from the price with its weight: the same as
    // from the sum, without keeping probabilities beside the logits.
    torch::autograd::variable_list roots = {output.logits}, gradients = {gradient};
    if (output.price.defined() && output.price.requires_grad()) {
      roots.push_back(output.price);
      gradients.push_back(
          at::full_like(output.price.detach(), report.lambda / static_cast<double>(parts)));
    }
    torch::autograd::backward(roots, gradients);

    const double share = 1.0 / static_cast<double>(parts);
    report.sampled.pairs += share * output.sampled.pairs;
    report.sampled.kv_end += share * output.sampled.kv_end;
    report.sampled.kv_mean += share * output.sampled.kv_mean;
    report.kv_end += share * output.argmax_kv_end;
  }
  report.loss = loss / static_cast<double>(tokens);
  report.gradient_norm = gradient_norm(model_.parameters());
  require_finite(report.loss, report.gradient_norm);
  const bool clip = options_.clip > 0 && report.gradient_norm > options_.clip;
  optimizer_.step(report.learning_rate, clip ? report.gradient_norm / options_.clip : 1.0);
  if (control_) control_->observe(report.kv_end);

  report.step = ++step_;
  const double seconds = seconds_since(begin);
  step_seconds_ += seconds;
  report.tokens_per_s = static_cast<double>(tokens) / seconds;
  return report;
}

void Trainer::require_finite(double loss, double norm) const {
  if (std::isfinite(loss) && std::isfinite(norm)) return;
  const auto bad = find_non_finite(model_.parameters());
  if (!bad && std::isfinite(loss)) return;  // only the norm's sum of squares overflowed
  std::ostringstream text;
  text << "step " << step_ + 1 << ": the loss is ";
  // Not streamed: the sign of a NaN is nobody's business.
  text << (std::isnan(loss) ? "nan" : std::isinf(loss) ? "infinite" : std::to_string(loss));
  if (bad) {
    text << "; the first tensor that is not finite is "
         << (bad->is_gradient ? "the gradient of " : "the weight ") << bad->name;
  }
  const fs::path last = checkpoints_.latest();
  if (last.empty()) {
    text << "; no checkpoint was written yet";
  } else {
    text << "; the last good checkpoint is " << last.string();
  }
  fail(text.str(), ". Try a lower --lr or a longer --warm-up");
}

void Trainer::save_checkpoint() {
  const auto bad = find_non_finite(model_.parameters());
  NATSLM_CHECK(!bad || bad->is_gradient, "step ", step_, ": the weight ", bad ? bad->name : "",
               " is not finite and is not saved; try a lower --lr or a longer --warm-up");
  Json state = {{"version", kStateVersion},
                {"step", step_},
                {"samples", step_ * options_.batch},
                {"step_seconds", step_seconds_},
                {"loss", last_.loss},
                {"shares", {last_.sampled.pairs, last_.kv_end, last_.sampled.kv_mean}},
                {"options", to_json(options_)},
                {"identity", parts_.identity}};
  if (control_) {
    const auto& control = control_->state();
    state["control"] = {
        {"log_lambda", control.log_lambda}, {"average", control.average}, {"steps", control.steps}};
  }
  checkpoints_.save(step_, state, [&](const fs::path& folder) {
    if (parts_.tokenizer != nullptr) parts_.tokenizer->save(folder);
    models::save_model(model_, folder);
    models::write_safetensors(folder / "optimizer.safetensors", optimizer_.state());
  });
  if (parts_.observer) parts_.observer->on_checkpoint(step_, checkpoints_.latest());
}

void Trainer::resume(const fs::path& checkpoint) {
  const Json state = open_checkpoint(checkpoint);
  const std::string where = checkpoint.string();
  NATSLM_CHECK(state.value("version", 0) == kStateVersion, where,
               " was written by another version of this program; start the run again");
  const Json mine = to_json(options_), saved = to_json(options_of(state));
  for_each_field(options_, [&](const char* name, const auto&, Affects affects, const char*) {
    NATSLM_CHECK(affects != Affects::kWeights || mine[name] == saved[name], "--", name, " is ",
                 mine[name].dump(), ", but the run in ", where, " has ", saved[name].dump(),
                 "; leave the option out to continue it, or start a new run");
  });
  const Json identity = state.value("identity", Json());
  for (const auto& [name, value] : parts_.identity.items()) {
    const Json before = identity.is_object() ? identity.value(name, Json()) : Json();
    NATSLM_CHECK(before == value, name, " is ", value.dump(), ", but the run in ", where, " has ",
                 before.dump(), "; continue with the same one, or start a new run");
  }

  models::load_weights(model_, checkpoint / "model.safetensors");
  const models::SafetensorsFile moments(checkpoint / "optimizer.safetensors");
  const c10::NoGradGuard no_grad;
  for (const auto& [name, moment] : optimizer_.state())
    at::Tensor(moment).copy_(moments.tensor(name, moment.sizes()));
  step_ = state.at("step").get<int64_t>();
  step_seconds_ = state.at("step_seconds").get<double>();
  last_.loss = state.at("loss").get<double>();
  last_.sampled.pairs = state.at("shares").at(0).get<double>();
  last_.kv_end = state.at("shares").at(1).get<double>();
  last_.sampled.kv_mean = state.at("shares").at(2).get<double>();
  optimizer_.set_steps(step_);
  if (control_) {
    const Json& control = state.at("control");
    control_->restore({.log_lambda = control.at("log_lambda").get<double>(),
                       .average = control.at("average").get<double>(),
                       .steps = control.at("steps").get<int64_t>()});
  }
  checkpoints_.set_latest(checkpoint);
}

Result Trainer::run() {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t first = step_;
  RunLog log(folder_ / "log.jsonl", step_);
  Mean mean;
  std::optional<Validation> validation;
  int64_t saved = step_ > 0 ? step_ : -1;
  while (step_ < options_.steps && !stop_requested()) {
    StepReport report = step();
    report.seconds_left = seconds_since(begin) / static_cast<double>(step_ - first) *
                          static_cast<double>(options_.steps - step_);
    mean.add(report);
    if (parts_.observer) parts_.observer->on_step(report);
    const bool done = step_ == options_.steps;
    const auto due = [&](int64_t every) { return every > 0 && step_ % every == 0; };
    if (done || due(options_.log_every)) {
      last_ = mean.take();
      log.write(last_);
      if (parts_.observer) parts_.observer->on_log(last_);
    }
    if (parts_.validate && (done || due(options_.validate_every))) {
      validation = parts_.validate();
      log.write(step_, *validation);
      if (parts_.observer) parts_.observer->on_validation(step_, *validation);
    }
    if (done || due(options_.checkpoint_every)) {
      save_checkpoint();
      saved = step_;
    }
  }
  if (saved != step_ && step_ > 0) save_checkpoint();

  Result result;
  result.stopped = step_ < options_.steps;
  result.steps = step_;
  result.tokens = step_ * options_.batch * options_.context;
  result.tokens_per_s = step_seconds_ > 0 ? static_cast<double>(result.tokens) / step_seconds_ : 0;
  result.loss = last_.loss;
  result.shares = last_.sampled;
  result.shares.kv_end = last_.kv_end;
  if (!result.stopped && !validation && parts_.validate) validation = parts_.validate();
  if (validation) {
    result.validation_perplexity = validation->perplexity;
    result.shares = validation->shares;
  }
  result.lambda = lambda();
  result.peak_bytes = peak_bytes();
  log.write(to_json(result));
  return result;
}

}  // namespace natslm::train
