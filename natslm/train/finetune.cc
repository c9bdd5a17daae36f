// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/finetune.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/models/safetensors.h"
#include "natslm/roles/roles.h"
#include "natslm/train/device.h"
#include "natslm/train/fields_json.h"
#include "natslm/train/finetune_loss.h"
#include "natslm/train/report_mean.h"
#include "natslm/train/run_log.h"
#include "natslm/train/schedule.h"
#include "natslm/train/step_plan.h"

namespace natslm::train {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using at::Tensor;

namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

models::NamedTensors learned_parameters(const models::Model& model) {
  models::NamedTensors learned;
  for (const auto& [name, tensor] : model.parameters())
    if (tensor.requires_grad()) learned.emplace_back(name, tensor);
  NATSLM_CHECK(!learned.empty(),
               "there is nothing to learn: the model was opened without score "
               "layers or adapters");
  return learned;
}

}  // namespace

Json to_json(const FinetuneResult& r) {
  return {{"steps", r.steps},
          {"tokens", r.tokens},
          {"seconds", r.seconds},
          {"tokens_per_s", r.seconds > 0 ? static_cast<double>(r.tokens) / r.seconds : 0.0},
          {"loss", r.loss},
          {"pairs", r.pairs},
          {"lambda", r.lambda},
          {"learned_numbers", r.learned_numbers},
          {"peak_device_bytes", r.peak_device_bytes}};
}

void add_adapters(models::Model& model, uint64_t seed) {
  const models::Config& c = model.config();
  const int64_t in = int64_t{c.q_heads} * c.head_dim, each = c.width + in;
  const int64_t wanted = int64_t{roles::kRoles} * c.kv_heads * c.width;
  model.add_adapters((wanted + each - 1) / each, seed);
}

FineTuner::FineTuner(models::Model& model, TextSamples samples, const FinetuneOptions& options,
                     fs::path folder, FinetuneParts parts)
    : model_(model),
      samples_(std::move(samples)),
      options_((check(options), options)),
      folder_(std::move(folder)),
      parts_(std::move(parts)),
      learned_(learned_parameters(model)),
      optimizer_(learned_, {options.beta1, options.beta2, 1e-8, options.decay}),
      checkpoints_(folder_, 1) {
  NATSLM_CHECK(options_.context <= model_.config().context, "--context is ", options_.context,
               "; the model was built for at most ", model_.config().context);
  if (options_.method == kRolesMethod && options_.lambda == 0) {
    if (options_.pairs == 0) options_.pairs = default_pairs(options_);
    control_.emplace(roles::BudgetOptions{.target = options_.pairs,
                                          .initial_lambda = options_.control_start,
                                          .gain = options_.control_gain});
  }
}

void FineTuner::add_part(int64_t step, int64_t first, int64_t count, const Tensor& tokens,
                         const Tensor& weights, double total_weight, StepReport& report) {
  const c10::Device device = model_.device();
  const Tensor ids = tokens.narrow(0, first, count).to(device).to(at::kLong);
  const Tensor weight = (weights.narrow(0, first, count) / total_weight).to(device);
  models::TrainingInput input;
  input.tokens = ids.slice(1, 0, options_.context).contiguous();
  input.seed = options_.seed;
  input.step = step;
  input.detach_scores = true;
  input.dense = options_.method != kRolesMethod;
  input.want_logits = false;
  input.recompute = options_.recompute;
  input.expected_pairs = options_.pairs > 0 ? options_.pairs : 0.3;
  Tensor sequences = at::empty({count}, at::kLong), biases = at::empty({count}, at::kFloat);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = step * options_.batch + first + i;
    sequences.mutable_data_ptr<int64_t>()[i] = number;
    biases.mutable_data_ptr<float>()[i] =
        options_.bias_range > 0 ? drawn_bias(options_.seed, step, number, options_.bias_range) : 0;
  }
  input.sequences = sequences.to(device);
  input.biases = biases.to(device);
  if (options_.price_slope > 0) input.price_weights = (input.biases * options_.price_slope).exp();

  Tensor teacher;
  if (options_.loss != kCrossEntropy) {
    const c10::NoGradGuard no_grad;
    models::TrainingInput all = input;
    all.dense = true;
    all.sample = false;
    teacher = model_.forward(all).hidden;
  }
  const models::TrainingOutput output = model_.forward(input);
  const RowsLoss loss = rows_loss(model_, options_.loss, output.hidden, teacher,
                                  ids.slice(1, 1).contiguous(), weight);
  torch::autograd::variable_list roots = {output.hidden},
                                 gradients = {loss.gradient.to(output.hidden.scalar_type())};
  const double share = static_cast<double>(count) / static_cast<double>(options_.batch);
  if (output.price.defined() && output.price.requires_grad()) {
    roots.push_back(output.price);
    gradients.push_back(at::full_like(output.price.detach(), report.lambda * share));
  }
  torch::autograd::backward(roots, gradients);
  report.loss += loss.loss.item<double>();
  report.sampled.pairs += share * output.sampled.pairs;
  report.sampled.kv_end += share * output.sampled.kv_end;
  report.sampled.kv_mean += share * output.sampled.kv_mean;
  report.kv_end += share * output.argmax_kv_end;
}

StepReport FineTuner::step(int64_t index) {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t t = options_.context;
  StepReport report{.sampled = {0, 0, 0}, .kv_end = 0};
  report.step = index + 1;
  report.lambda = control_ ? control_->lambda() : options_.lambda;
  report.learning_rate = options_.learning_rate *
                         schedule(index, options_.steps, options_.warm_up, options_.final_share);
  const Tensor tokens = at::empty({options_.batch, t + 1}, at::kInt),
               weights = at::empty({options_.batch, t}, at::kFloat);
  for (int64_t i = 0; i < options_.batch; ++i) {
    samples_(index * options_.batch + i,
             {tokens.mutable_data_ptr<int32_t>() + i * (t + 1), static_cast<size_t>(t + 1)},
             {weights.mutable_data_ptr<float>() + i * t, static_cast<size_t>(t)});
  }
  const double total = weights.sum(at::kDouble).item<double>();
  NATSLM_CHECK(total > 0, "step ", index + 1, ": no token of its texts counts in the loss");

  optimizer_.zero_gradients();
  const int64_t portion = options_.micro_batch > 0 ? options_.micro_batch : options_.batch;
  for (int64_t first = 0; first < options_.batch; first += portion)
    add_part(index, first, portion, tokens, weights, total, report);
  report.gradient_norm = gradient_norm(learned_);
  if (!std::isfinite(report.loss) || !std::isfinite(report.gradient_norm)) {
    const auto bad = find_non_finite(learned_);
    const fs::path good = checkpoints_.latest();
    fail("step ", report.step, ": loss or gradient is not finite",
         bad ? "; the first such tensor is the " +
                   std::string(bad->is_gradient ? "gradient of " : "weight ") + bad->name
             : std::string(),
         good.empty() ? "; no checkpoint was written yet"
                      : "; the last good checkpoint is " + good.string(),
         ". Try a lower --lr or a longer --warm-up");
  }
  const bool clip = options_.clip > 0 && report.gradient_norm > options_.clip;
  optimizer_.step(report.learning_rate, clip ? report.gradient_norm / options_.clip : 1.0);
  if (control_) control_->observe(report.sampled.pairs);
  const double seconds = seconds_since(begin);
  seconds_ += seconds;
  report.tokens_per_s = static_cast<double>(options_.batch * t) / seconds;
  return report;
}

void FineTuner::save_checkpoint() {
  Json state = {{"step", step_},
                {"seconds", seconds_},
                {"loss", last_.loss},
                {"pairs", last_.sampled.pairs},
                {"options", fields_json(options_)},
                {"identity", parts_.identity}};
  if (control_) {
    const roles::BudgetControl::State& s = control_->state();
    state["control"] = {{"log_lambda", s.log_lambda}, {"average", s.average}, {"steps", s.steps}};
  }
  checkpoints_.save(step_, state, [&](const fs::path& folder) {
    models::write_safetensors(folder / "learned.safetensors", learned_);
    models::write_safetensors(folder / "optimizer.safetensors", optimizer_.state());
  });
}

bool FineTuner::resume() {
  const fs::path from = checkpoints_.latest();
  if (from.empty()) return false;
  const Json state = open_checkpoint(from);
  const std::string where = from.string();
  try {
    check_same_weights(options_, state.at("options"), where,
                       "give the same to continue it, or remove the folder to begin anew");
    NATSLM_CHECK(state.at("identity") == parts_.identity, "the run in ", where,
                 " had another model or other texts; give the same to continue it, or remove the "
                 "folder to begin anew");
    const c10::NoGradGuard no_grad;
    const auto fill = [&](const char* name, const models::NamedTensors& tensors) {
      const models::SafetensorsFile file(from / name);
      for (const auto& [key, tensor] : tensors)
        Tensor(tensor).copy_(file.tensor(key, tensor.sizes()));
    };
    fill("learned.safetensors", learned_);
    fill("optimizer.safetensors", optimizer_.state());
    step_ = state.at("step").get<int64_t>();
    seconds_ = state.at("seconds").get<double>();
    last_.loss = state.at("loss").get<double>();
    last_.sampled.pairs = state.at("pairs").get<double>();
    optimizer_.set_steps(step_);
    if (control_) {
      const Json& control = state.at("control");
      control_->restore({.log_lambda = control.at("log_lambda").get<double>(),
                         .average = control.at("average").get<double>(),
                         .steps = control.at("steps").get<int64_t>()});
    }
  } catch (const nlohmann::json::exception&) {
    fail(where, " was written by another version of this program; remove the folder to begin anew");
  }
  return true;
}

FinetuneResult FineTuner::run() {
  const auto begin = std::chrono::steady_clock::now();
  const int64_t first = step_;
  std::error_code error;
  fs::create_directories(folder_, error);
  NATSLM_CHECK(!error, folder_.string(), " cannot be made: ", error.message());
  RunLog log(folder_ / "log.jsonl", first);
  const c10::Device device = model_.device();
  if (device.is_cuda()) reset_peak_device_bytes(device);

  ReportMean mean;
  bool stopped = false;
  while (step_ < options_.steps && !(stopped = parts_.stop && parts_.stop())) {
    StepReport report = step(step_);
    ++step_;
    report.seconds_left = seconds_since(begin) / static_cast<double>(step_ - first) *
                          static_cast<double>(options_.steps - step_);
    if (parts_.on_step) parts_.on_step(report);
    mean.add(report);
    if (step_ % options_.log_every == 0 || step_ == options_.steps) {
      last_ = mean.take();
      log.write(last_);
    }
    if (options_.checkpoint_every > 0 && step_ % options_.checkpoint_every == 0 &&
        step_ < options_.steps)
      save_checkpoint();
  }
  // Also of a finished run: what its caller does next, such as measuring budgets, may be stopped.
  if (step_ > first) save_checkpoint();

  FinetuneResult result;
  result.stopped = stopped;
  result.steps = step_;
  result.tokens = step_ * options_.batch * options_.context;
  result.seconds = seconds_;
  result.loss = last_.loss;
  result.pairs = last_.sampled.pairs;
  result.lambda = control_ ? control_->lambda() : options_.lambda;
  for (const auto& [name, tensor] : learned_) result.learned_numbers += tensor.numel();
  if (device.is_cuda()) result.peak_device_bytes = peak_device_bytes(device);
  return result;
}

double FineTuner::dense_step_ms(int64_t repeats) {
  const c10::Device device = model_.device();
  const int64_t t = options_.context;
  const int64_t portion = options_.micro_batch > 0 ? options_.micro_batch : options_.batch;
  const Tensor tokens = at::empty({options_.batch, t + 1}, at::kInt);
  std::vector<float> unused(t);
  for (int64_t i = 0; i < options_.batch; ++i)
    samples_(i, {tokens.mutable_data_ptr<int32_t>() + i * (t + 1), static_cast<size_t>(t + 1)},
             unused);
  double best = 0;
  // A pass from the last hidden states back to the embedding: what any fine-tuning of a frozen
  // model needs. The embedding must want a gradient for that, else nothing would be computed.
  std::vector<std::pair<Tensor, bool>> wanted;
  for (const auto& [name, parameter] : model_.parameters()) {
    wanted.emplace_back(parameter, parameter.requires_grad());
    Tensor(parameter).requires_grad_(name == "embedding.weight");
  }
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    double sink = 0;
    for (int64_t first = 0; first < options_.batch; first += portion) {
      const Tensor ids = tokens.narrow(0, first, portion).to(device).to(at::kLong);
      models::TrainingInput input;
      input.tokens = ids.slice(1, 0, t).contiguous();
      input.dense = true;
      input.want_logits = false;
      input.recompute = options_.recompute;
      const models::TrainingOutput output = model_.forward(input);
      const RowsLoss loss =
          rows_loss(model_, kCrossEntropy, output.hidden, {}, ids.slice(1, 1).contiguous(),
                    at::full({portion, t}, 1.0 / static_cast<double>(portion * t),
                             at::TensorOptions(at::kFloat).device(device)));
      torch::autograd::backward({output.hidden}, {loss.gradient.to(output.hidden.scalar_type())});
      sink += loss.loss.item<double>();
      for (const auto& [name, parameter] : model_.parameters()) {
        if (!parameter.grad().defined()) continue;
        sink += parameter.grad().select(0, 0).sum().item<double>();  // waits for the device
        parameter.mutable_grad() = Tensor();
      }
    }
    const double ms = 1e3 * seconds_since(begin);
    if (repeat == 0 || ms < best) best = ms;
    NATSLM_CHECK(std::isfinite(sink), "the dense model's loss is not finite");
  }
  for (const auto& [parameter, gradient] : wanted) Tensor(parameter).requires_grad_(gradient);
  return best;
}

std::vector<float> calibration_biases(double range, int64_t count) {
  std::vector<float> biases;
  const double step = 2 * range / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (int64_t i = 0; i < count; ++i) biases.push_back(static_cast<float>(-range + step * i));
  if (std::ranges::find(biases, 0.0f) == biases.end()) {
    biases.push_back(0.0f);
    std::ranges::sort(biases);
  }
  return biases;
}

roles::Calibration calibrate(models::Model& model, std::span<const int32_t> texts, int64_t context,
                             std::span<const float> biases,
                             const std::function<void(int64_t, int64_t)>& progress) {
  NATSLM_CHECK(
      context > 0 && texts.size() >= static_cast<size_t>(context) && texts.size() % context == 0,
      "a calibration of ", texts.size(), " tokens is no whole number of texts of ", context);
  const c10::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(texts.size()) / context;
  const Tensor tokens =
      at::from_blob(const_cast<int32_t*>(texts.data()), {count, context}, at::kInt)
          .to(model.device())
          .to(at::kLong);
  roles::Calibration result;
  std::vector<double> layer_keys(model.config().layers, 0.0);
  const auto total = static_cast<int64_t>(biases.size()) * count;
  int64_t done = 0;
  for (const float bias : biases) {
    double kv_end = 0;
    for (int64_t i = 0; i < count; ++i) {
      models::TrainingInput input;
      input.tokens = tokens.narrow(0, i, 1);
      input.sample = false;
      input.bias = bias;
      input.want_logits = false;
      const models::TrainingOutput output = model.forward(input);
      kv_end += output.sampled.kv_end / static_cast<double>(count);
      for (size_t layer = 0; layer < layer_keys.size(); ++layer)
        layer_keys[layer] += output.layer_kv_end[layer];
      if (progress) progress(++done, total);
    }
    // More bias, fewer keys; but for roles that hang on what other roles hide.
    if (!result.kv_end.empty()) kv_end = std::min(kv_end, double{result.kv_end.back()});
    result.bias.push_back(bias);
    result.kv_end.push_back(static_cast<float>(kv_end));
  }
  double keys = 0;
  for (const double of_layer : layer_keys) keys += of_layer;
  for (const double of_layer : layer_keys)
    result.layer_shares.push_back(static_cast<float>(of_layer / keys));
  return result;
}

}  // namespace natslm::train
