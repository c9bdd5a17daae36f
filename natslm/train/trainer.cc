// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/trainer.h"

#include <c10/core/GradMode.h>
#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/models/models.h"
#include "natslm/models/safetensors.h"
#include "natslm/train/device_steps.h"
#include "natslm/train/fields_json.h"
#include "natslm/train/report_mean.h"
#include "natslm/train/run_log.h"
#include "natslm/train/steps.h"

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
      {"peak_bytes", r.peak_bytes},
      {"peak_device_bytes", r.peak_device_bytes}};
}

fs::path checkpoint_folder(const fs::path& run_folder) {
  return run_folder / "checkpoints";
}

Options options_of(const Json& state) {
  Options options;
  try {
    for_each_field(options, [&](const auto& field, auto& value) {
      value = state.at("options").at(field.name).template get<std::decay_t<decltype(value)>>();
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
      checkpoints_(checkpoint_folder(folder_), options.keep_checkpoints, parts_.probe) {
  NATSLM_CHECK(dataset_.windows(options_.context) > 0, "the text has ", dataset_.tokens(),
               " tokens, fewer than one window of ", options_.context + 1,
               "; give more text or a shorter --context");
  NATSLM_CHECK(options_.context <= model_.config().context, "--context is ", options_.context,
               "; the model was built for at most ", model_.config().context);
  NATSLM_CHECK(options_.optimize == kJoint || model_.config().roles.set != roles::RoleSet::kDense,
               "--optimize is ", options_.optimize, "; a dense model has no roles to train apart");
  steps_ = model_.device().is_cpu()
               ? make_autograd_steps(model_, dataset_, options_)
               : make_device_steps(model_, dataset_, options_, {.graph = parts_.graph});
}

Trainer::~Trainer() = default;

bool Trainer::stop_requested() const {
  return parts_.stop && parts_.stop();
}

StepReport Trainer::finish_step() {
  const FinishedStep done = steps_->finish();
  if (done.failed) {
    std::ostringstream text;
    const double loss = done.report.loss;
    text << "step " << done.report.step << ": the loss is ";
    // Not streamed: the sign of a NaN is nobody's business.
    text << (std::isnan(loss) ? "nan" : std::isinf(loss) ? "infinite" : std::to_string(loss));
    if (done.bad) {
      text << "; the first tensor that is not finite is "
           << (done.bad->is_gradient ? "the gradient of " : "the weight ") << done.bad->name;
    }
    const fs::path last = checkpoints_.latest();
    if (last.empty()) {
      text << "; no checkpoint was written yet";
    } else {
      text << "; the last good checkpoint is " << last.string();
    }
    fail(text.str(), ". Try a lower --lr or a longer --warm-up");
  }
  step_ = done.report.step;
  step_seconds_ += done.seconds;
  return done.report;
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
                {"options", fields_json(options_)},
                {"identity", parts_.identity}};
  if (const auto control = steps_->control()) {
    state["control"] = {{"log_lambda", control->log_lambda},
                        {"average", control->average},
                        {"steps", control->steps}};
  }
  checkpoints_.save(step_, state, [&](const fs::path& folder) {
    if (parts_.tokenizer != nullptr) parts_.tokenizer->save(folder);
    models::save_model(model_, folder);
    models::write_safetensors(folder / "optimizer.safetensors", steps_->optimizer().state());
  });
  if (parts_.observer) parts_.observer->on_checkpoint(step_, checkpoints_.latest());
}

void Trainer::resume(const fs::path& checkpoint) {
  const Json state = open_checkpoint(checkpoint);
  const std::string where = checkpoint.string();
  NATSLM_CHECK(state.value("version", 0) == kStateVersion, where,
               " was written by another version of this program; start the run again");
  check_same_weights(options_, fields_json(options_of(state)), where,
                     "leave the option out to continue it, or start a new run");
  const Json identity = state.value("identity", Json());
  for (const auto& [name, value] : parts_.identity.items()) {
    const Json before = identity.is_object() ? identity.value(name, Json()) : Json();
    NATSLM_CHECK(before == value, name, " is ", value.dump(), ", but the run in ", where, " has ",
                 before.dump(), "; continue with the same one, or start a new run");
  }

  models::load_weights(model_, checkpoint / "model.safetensors");
  const models::SafetensorsFile moments(checkpoint / "optimizer.safetensors");
  const c10::NoGradGuard no_grad;
  for (const auto& [name, moment] : steps_->optimizer().state())
    at::Tensor(moment).copy_(moments.tensor(name, moment.sizes()));
  step_ = state.at("step").get<int64_t>();
  step_seconds_ = state.at("step_seconds").get<double>();
  last_.loss = state.at("loss").get<double>();
  last_.sampled.pairs = state.at("shares").at(0).get<double>();
  last_.kv_end = state.at("shares").at(1).get<double>();
  last_.sampled.kv_mean = state.at("shares").at(2).get<double>();
  steps_->optimizer().set_steps(step_);
  if (steps_->control()) {
    const Json& control = state.at("control");
    steps_->restore_control({.log_lambda = control.at("log_lambda").get<double>(),
                             .average = control.at("average").get<double>(),
                             .steps = control.at("steps").get<int64_t>()});
  }
  checkpoints_.set_latest(checkpoint);
}

Result Trainer::run() {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t first = step_;
  RunLog log(folder_ / "log.jsonl", step_);
  ReportMean mean;
  std::optional<Validation> validation;
  int64_t saved = step_ > 0 ? step_ : -1;
  // Takes the oldest step that has begun.
  const auto take = [&] {
    StepReport report = finish_step();
    report.seconds_left = seconds_since(begin) / static_cast<double>(step_ - first) *
                          static_cast<double>(options_.steps - step_);
    mean.add(report);
    if (parts_.observer) parts_.observer->on_step(report);
    if (step_ == options_.steps || step_ % options_.log_every == 0) {
      last_ = mean.take();
      log.write(last_);
      if (parts_.observer) parts_.observer->on_log(last_);
    }
  };
  int64_t begun = step_;
  while (begun < options_.steps && !stop_requested()) {
    steps_->begin(begun++);
    const bool done = begun == options_.steps;
    const auto due = [&](int64_t every) { return every > 0 && begun % every == 0; };
    const bool validates = parts_.validate && (done || due(options_.validate_every)),
               saves = done || due(options_.checkpoint_every);
    // Both look at the weights as they are after this very step.
    const int64_t unfinished = validates || saves ? 0 : steps_->ahead();
    while (begun - step_ > unfinished) take();
    if (validates) {
      validation = parts_.validate();
      log.write(step_, *validation);
      if (parts_.observer) parts_.observer->on_validation(step_, *validation);
    }
    if (saves) {
      save_checkpoint();
      saved = step_;
    }
  }
  while (step_ < begun) take();
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
  result.lambda = steps_->lambda();
  result.peak_bytes = peak_bytes();
  result.peak_device_bytes = steps_->peak_device_bytes();
  log.write(to_json(result));
  return result;
}

}  // namespace natslm::train
