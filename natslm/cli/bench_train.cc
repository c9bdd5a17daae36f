// nats-lm bench train: a training step (forward, backward, AdamW) with roles against one of the
// same model without.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/bench_train.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "natslm/base/lifetime.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/device.h"
#include "natslm/models/models.h"
#include "natslm/ops/attention.h"
#include "natslm/train/adamw.h"
#include "natslm/train/cross_entropy.h"

namespace natslm::cli {

namespace {

// A model with its optimiser; step() does to it what training does.
class Arm {
 public:
  Arm(const models::Config& config, const TrainBench& o, const at::Tensor& windows)
      : model_(models::make_model(config, o.seed)),
        optimizer_(model_->parameters(), {}),
        targets_(windows.slice(1, 1)) {
    input_.tokens = windows.slice(1, 0, windows.size(1) - 1).contiguous();
    input_.seed = o.seed;
    input_.bias = o.bias;
  }

  void step() {
    optimizer_.zero_gradients();
    const models::TrainingOutput output = model_->forward(input_);
    const at::Tensor gradient = output.logits.detach().contiguous();
    train::cross_entropy_to_gradient(gradient, targets_, 1.0 / double(targets_.numel()));
    torch::autograd::variable_list roots = {output.logits}, gradients = {gradient};
    if (output.price.defined()) {
      roots.push_back(output.price);
      gradients.push_back(at::full_like(output.price.detach(), 0.1));
    }
    torch::autograd::backward(roots, gradients);
    train::gradient_norm(model_->parameters());
    optimizer_.step(1e-5);
    shares_ = output.sampled;
    ++input_.step;
  }
  const models::Shares& shares() const { return shares_; }

 private:
  std::unique_ptr<models::Model> model_;
  train::AdamW optimizer_;
  models::TrainingInput input_;
  at::Tensor targets_;
  models::Shares shares_;
};

// Forward and backward of one dense attention of this model: our own kernel with every key alive
// against LibTorch's.
Comparison dense_attention(const models::Config& c, int32_t batch, int32_t repeat) {
  const auto normal = [&](int32_t heads) {
    return at::randn({batch, heads, c.context, c.head_dim}).requires_grad_(true);
  };
  const at::Tensor q = normal(c.q_heads), k = normal(c.kv_heads), v = normal(c.kv_heads);
  const at::Tensor grad = at::ones_like(q.detach());
  const at::Tensor last = at::full({batch, c.kv_heads, c.context}, kForever, at::kInt);
  const auto finish = [&](const at::Tensor& out) {
    out.backward(grad);
    for (const at::Tensor& x : {q, k, v}) x.mutable_grad() = at::Tensor();
  };
  return compare([&] { finish(ops::attention(q, k, v, last).out); },
                 [&] {
                   finish(at::scaled_dot_product_attention(q, k, v, {}, 0.0, true, std::nullopt,
                                                           c.q_heads != c.kv_heads));
                 },
                 repeat);
}

void run(const TrainBench& o, Context& context) {
  const c10::Device device = device_from(o.device);
  context.measured_on(device);
  if (!device.is_cpu()) return bench_train_on_device(o, context);
  const models::Config config = model_of(o), dense_config = without_roles(config);
  const int32_t batch = batch_of(o);
  const at::Tensor windows = at::randint(config.vocabulary, {batch, config.context + 1}, at::kLong);

  at::AutoGradMode gradients(true);
  Arm with_roles(config, o, windows), dense(dense_config, o, windows);
  BenchResult result;
  result.times = compare([&] { with_roles.step(); }, [&] { dense.step(); }, o.repeat);
  // The dense model trains with our own kernel, every key alive. Where LibTorch's attention is
  // faster, a dense model could have used it: the baseline gets the difference.
  result.baseline = "dense, own kernel";
  const double own_step_ms = result.times.baseline.median();
  const Comparison attention = dense_attention(config, batch, o.repeat);
  const double gain_ms = config.layers * (attention.ours.median() - attention.baseline.median());
  if (gain_ms > 0) {
    result.baseline = "dense, LibTorch";
    for (double& ms : result.times.baseline.ms) ms -= gain_ms;
  }
  report_steps(context, config, batch, with_roles.shares(), result,
               {{"own_dense_step_ms", own_step_ms},
                {"own_dense_attention_ms", attention.ours.median()},
                {"sdpa_attention_ms", attention.baseline.median()}});
}

}  // namespace

models::Config model_of(const TrainBench& o) {
  models::Config config = models::preset(o.preset).config;
  if (o.context > 0) {
    config.context = o.context;
    config.roles.window = models::default_window(o.context);
  }
  config.roles.set = roles::role_set_from(o.roles);
  return config;
}

int32_t batch_of(const TrainBench& o) {
  return o.batch > 0 ? o.batch : models::preset(o.preset).batch;
}

models::Config without_roles(models::Config config) {
  config.roles.set = roles::RoleSet::kDense;
  return config;
}

void report_steps(Context& context, const models::Config& config, int32_t batch,
                  const models::Shares& shares, BenchResult result, nlohmann::ordered_json more) {
  const double positions = config.context;
  result.causal_pairs = 0.5 * positions * (positions + 1) * batch * config.q_heads * config.layers;
  result.live_pairs = shares.pairs * result.causal_pairs;
  result.kv_end = shares.kv_end;
  result.flop_per_pair = 14.0 * config.head_dim;
  const double ours = 1000 * batch * positions / result.times.ours.median(),
               baseline = 1000 * batch * positions / result.times.baseline.median();
  more["tokens_per_s"] = ours;
  more["baseline_tokens_per_s"] = baseline;
  report(context, result, more);
  std::printf(
      "%.0f tokens/s with roles, %.0f dense (the rates above count attention's work only)\n", ours,
      baseline);
}

void add_bench_train(CLI::App& bench, Context& context) {
  auto o = std::make_shared<TrainBench>();
  CLI::App& command = context.add(bench, "train", "a training step with roles against a dense one",
                                  [o, &context] { run(*o, context); });
  command.add_option("--preset", o->preset, "model and batch (see nats-lm models)");
  command.add_option("--roles", o->roles, "roles that keys may have")
      ->check(CLI::IsMember({"gls", "gs", "gl"}));
  command.add_option("--context", o->context, "tokens a sequence; 0: the preset's")
      ->check(CLI::Range(0, 1 << 20));
  command.add_option("--batch", o->batch, "sequences a step; 0: the preset's")
      ->check(CLI::Range(0, 1 << 16));
  command
      .add_option(
          "--bias", o->bias,
          "added to the window role's logit, so that the untrained model keeps as few keys as a "
          "trained one")
      ->check(CLI::Range(-20.0, 20.0));
  command.add_option("--repeat", o->repeat, "measurements of each side, taken in turn")
      ->check(CLI::Range(1, 10000));
  command.add_option("--seed", o->seed, "of weights and roles");
  add_device_option(command, o->device);
  command
      .add_option("--micro-batch", o->micro_batch,
                  "sequences in memory at once, on a GPU; 0: the whole batch")
      ->check(CLI::Range(0, 1 << 16));
  command.add_option("--cuda-graph", o->graph,
                     "on a GPU: record a step once and repeat it; false: launch each kernel anew");
}

}  // namespace natslm::cli
