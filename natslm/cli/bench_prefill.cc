// nats-lm bench prefill: a prompt through a whole model with random weights and the evicting cache,
// against the same model that keeps every key and, on a GPU, against one dense pass without a
// cache. SPDX-License-Identifier: Apache-2.0
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "natslm/base/error.h"
#include "natslm/cache/kv_cache.h"
#include "natslm/cache/policy.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/device.h"
#include "natslm/cli/table.h"
#include "natslm/models/models.h"
#include "natslm/policies/policies.h"
#include "natslm/roles/streaming_lifetimes.h"

namespace natslm::cli {

namespace {

struct Options {
  Workload work;                         // all but what the list below replaces
  std::vector<int32_t> tokens = {4096};  // of the prompts
  int32_t layers = 4;
  int32_t chunk = 0;  // 0: what suits the device
  std::string policy;
  std::string device = "cpu";
};

constexpr int32_t kChunkOnCpu = 256, kChunkOfLongPrompts = 4096;

// Lifetimes of random roles with the shares of the workload, as a model's own would be written.
class DrawnRoles : public cache::Policy {
 public:
  explicit DrawnRoles(const Workload& workload) : workload_(workload) {}
  std::string spec() const override { return "drawn roles"; }

  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override {
    const int64_t heads = fresh.last.size(0), n = fresh.last.size(1);
    for (int64_t head = 0; head < heads; ++head) {
      int32_t* last = fresh.last.mutable_data_ptr<int32_t>() + head * n;
      for (int32_t t = 0; t < n; ++t) {
        const int32_t position = fresh.first_position + t;
        const roles::Role role = draw_role(workload_, position, fresh.layer * heads + head);
        last[t] = roles::arriving_last(role, position, workload_.window);
        if (role != roles::kGlobal) continue;
        cache::end_open(stored[head], position);
        std::replace(last, last + t, kOpenEnded, position);
      }
    }
  }

 private:
  Workload workload_;
};

models::Config config_of(const Options& o) {
  models::Config config;
  config.layers = o.layers;
  config.q_heads = o.work.heads;
  config.kv_heads = o.work.kv_heads;
  config.head_dim = o.work.head_dim;
  config.width = o.work.heads * o.work.head_dim;
  config.hidden = 4 * config.width;
  config.context = *std::ranges::max_element(o.tokens);
  config.roles.set = roles::RoleSet::kDense;
  return config;
}

cache::Shape cache_shape(const models::Model& model, const Workload& w, const c10::Device& device) {
  cache::Shape shape = model.cache_shape(scalar_type(w));
  shape.device = device;
  return shape;
}

// Bytes that the run is known to need on a GPU: weights, every key kept, and the widest tensors of
// a pass over `rows` tokens.
double bytes_needed(const models::Model& model, const Options& o, double rows) {
  const Workload& w = o.work;
  double weights = 0;
  for (const auto& [name, tensor] : model.parameters()) weights += double(tensor.numel());
  const double keys = double(w.batch) * w.tokens * w.kv_heads * o.layers * 2 * w.head_dim;
  const models::Config& c = model.config();
  const double widest = rows * (2.0 * c.hidden + 8.0 * c.width + c.vocabulary);
  return 2 * (weights + 1.1 * keys + widest);
}

// One causal pass without a cache, every key visible.
void dense_pass(models::Model& model, const at::Tensor& tokens) {
  const at::AutoGradMode off(false);
  models::TrainingInput input;
  input.tokens = tokens;
  input.sample = false;
  model.forward(input);
}

// The prompts of all sequences through a new cache; what that cache came to hold.
cache::Usage prefill(models::Model& model, std::unique_ptr<cache::Policy> policy,
                     const at::Tensor& tokens, const Options& o, cache::Usage& peak) {
  cache::KvCache cache(cache_shape(model, o.work, tokens.device()), std::move(policy));
  models::StepInput input;
  for (int32_t b = 0; b < o.work.batch; ++b) input.step.slots.push_back(cache.add_sequence());
  for (int32_t begin = 0; begin < o.work.tokens; begin += o.chunk) {
    const int32_t n = std::min(o.chunk, o.work.tokens - begin);
    input.step.row_start.clear();
    for (int32_t b = 0; b <= o.work.batch; ++b) input.step.row_start.push_back(b * n);
    input.tokens = tokens.narrow(1, begin, n).reshape({int64_t{o.work.batch} * n});
    input.last_row_only = true;
    model.step(input, cache);
  }
  peak = cache.peak();
  return cache.usage();
}

// What is asked of whole prompts in a model of 32/8/128: time beside dense attention's, from that
// many tokens on (11 % Global, 3 % Local, W 256).
double most_time_beside_dense(int32_t tokens) {
  constexpr std::pair<int32_t, double> kAims[] = {
      {200000, 0.32}, {150000, 0.375}, {100000, 0.47}, {50000, 0.65}};
  for (const auto& [from, aim] : kAims) {
    if (tokens >= from) return aim;
  }
  return 1;
}

// Prompts of one length.
void run_length(models::Model& model, Options o, const c10::Device& device, Context& context) {
  const Workload& w = o.work;
  bool with_dense = false;
  if (device.is_cuda()) {
    const auto memory = double(gpu_facts().memory);
    with_dense = bytes_needed(model, o, double(w.batch) * w.tokens) < 0.8 * memory;
    if (o.chunk == 0) o.chunk = with_dense ? w.tokens : kChunkOfLongPrompts;
    const double needed = bytes_needed(model, o, double(w.batch) * o.chunk);
    NATSLM_CHECK(needed < memory, "about ", bytes(static_cast<int64_t>(needed)),
                 " of GPU memory are needed, there are ", bytes(static_cast<int64_t>(memory)),
                 ": take fewer --layers or --tokens, or a smaller --prefill-chunk");
  } else if (o.chunk == 0) {
    o.chunk = kChunkOnCpu;
  }
  const policies::PolicyContext facts = {.shape = cache_shape(model, w, device),
                                         .roles = model.config().roles,
                                         .context = w.tokens,
                                         .seed = w.seed};
  const auto ours = [&]() -> std::unique_ptr<cache::Policy> {
    if (o.policy.empty()) return std::make_unique<DrawnRoles>(w);
    return policies::make_policy(o.policy, facts);
  };
  const at::Tensor tokens =
      at::randint(model.config().vocabulary, {w.batch, w.tokens}, at::kLong).to(device);

  cache::Usage end, peak, full_end, full_peak;
  std::vector<std::function<void()>> sides = {
      [&] { end = prefill(model, ours(), tokens, o, peak); },
      [&] {
        full_end = prefill(model, policies::make_policy("full", facts), tokens, o, full_peak);
      }};
  if (with_dense) sides.push_back([&] { dense_pass(model, tokens); });
  const std::vector<Timing> times = time_in_turn(sides, w.repeat, device);
  BenchResult result;
  result.baseline = "full";
  result.times = {times[0], times[1]};
  const double heads = double(w.heads) * o.layers * w.batch;
  result.causal_pairs = 0.5 * w.tokens * (w.tokens + 1.0) * heads;
  if (o.policy.empty()) {
    const RandomRoles roles = draw_roles(w, int64_t{o.layers} * w.kv_heads);
    result.live_pairs = double(roles.live_pairs) * w.heads / w.kv_heads * w.batch;
  }
  result.kv_end = double(end.live_keys) / double(full_end.live_keys);
  result.flop_per_pair = 4.0 * w.head_dim;
  nlohmann::ordered_json more = {
      {"policy", ours()->spec()},
      {"tokens", w.tokens},
      {"prefill_chunk", o.chunk},
      {"tokens_per_s", 1000.0 * w.batch * w.tokens / result.times.ours.median()},
      {"kv_bytes_end", end.held_bytes},
      {"kv_bytes_peak", peak.held_bytes},
      {"baseline_kv_bytes_peak", full_peak.held_bytes}};
  if (with_dense) more["dense_ms"] = times[2].median();
  report(context, result, more);
  std::printf("keys and values at their peak: %s of %s\n", bytes(peak.held_bytes).c_str(),
              bytes(full_peak.held_bytes).c_str());
  if (with_dense) {
    const double dense = times[2].median();
    std::printf(
        "prefill of %d tokens, beside one dense pass without a cache (%.3f ms): ours %.3fx its "
        "time "
        "(aim for 32/8/128: %.2fx), full %.3fx\n",
        w.tokens, dense, times[0].median() / dense, most_time_beside_dense(w.tokens),
        times[1].median() / dense);
  }
}

void run(Options o, Context& context) {
  const c10::Device device = device_from(o.device);
  context.measured_on(device);
  Workload& w = o.work;
  if (w.dtype.empty()) w.dtype = device.is_cuda() ? "bfloat16" : "float32";
  check(w);
  NATSLM_CHECK(device.is_cpu() || w.dtype == "bfloat16", "--dtype ", w.dtype,
               ": on a GPU keys are stored as bfloat16; give --dtype bfloat16");
  const auto model = models::make_model(config_of(o), w.seed);
  if (device.is_cuda()) {
    for (const auto& [name, tensor] : model->parameters()) {
      at::Tensor(tensor).set_data(tensor.detach().to(scalar_type(w)));
    }
    model->to(device);
  }
  for (const int32_t tokens : o.tokens) {
    w.tokens = tokens;
    run_length(*model, o, device, context);
  }
}

}  // namespace

void add_bench_prefill(CLI::App& bench, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(
      bench, "prefill", "a prompt through a model with random weights against keeping every key",
      [o, &context] { run(*o, context); });
  o->work.dtype.clear();
  add_workload_options(command, o->work);
  command.remove_option(command.get_option("--tokens"));
  command.add_option("--tokens", o->tokens, "lengths of the prompts, one after the other")
      ->check(CLI::Range(1, 1 << 22));
  command.get_option("--dtype")->description(
      "of keys and values (GPU: of all); empty: the device's usual");
  add_device_option(command, o->device);
  command.add_option("--layers", o->layers, "layers of the model")->check(CLI::Range(1, 1024));
  command
      .add_option(
          "--prefill-chunk", o->chunk,
          "tokens of each sequence in a step; 0: 256, on a GPU whole prompts (4,096 if they "
          "do not fit)")
      ->check(CLI::Range(0, 1 << 22));
  command.add_option("--policy", o->policy,
                     "who decides what is kept (see nats-lm policies); empty: the roles drawn");
}

}  // namespace natslm::cli
