// nats-lm bench prefill: a prompt through a whole model with random weights and the evicting cache,
// against the same model that keeps every key.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/randint.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "natslm/cache/kv_cache.h"
#include "natslm/cache/policy.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/table.h"
#include "natslm/models/models.h"
#include "natslm/policies/policies.h"
#include "natslm/roles/streaming_lifetimes.h"

namespace natslm::cli {

namespace {

struct Options {
  Workload work;
  int32_t layers = 4;
  int32_t chunk = 256;
  std::string policy;
};

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
  config.context = o.work.tokens;
  config.roles.set = roles::RoleSet::kDense;
  return config;
}

// The prompts of all sequences through a new cache; what that cache came to hold.
cache::Usage prefill(models::Model& model, std::unique_ptr<cache::Policy> policy,
                     const at::Tensor& tokens, const Options& o, cache::Usage& peak) {
  cache::KvCache cache(model.cache_shape(scalar_type(o.work)), std::move(policy));
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

void run(const Options& o, Context& context) {
  check(o.work);
  const Workload& w = o.work;
  const auto model = models::make_model(config_of(o), w.seed);
  const policies::PolicyContext facts = {.shape = model->cache_shape(scalar_type(w)),
                                         .roles = model->config().roles,
                                         .context = w.tokens,
                                         .seed = w.seed};
  const auto ours = [&]() -> std::unique_ptr<cache::Policy> {
    if (o.policy.empty()) return std::make_unique<DrawnRoles>(w);
    return policies::make_policy(o.policy, facts);
  };
  const at::Tensor tokens = at::randint(model->config().vocabulary, {w.batch, w.tokens}, at::kLong);

  cache::Usage end, peak, full_end, full_peak;
  BenchResult result;
  result.baseline = "full";
  result.times = compare([&] { end = prefill(*model, ours(), tokens, o, peak); },
                         [&] {
                           full_end = prefill(*model, policies::make_policy("full", facts), tokens,
                                              o, full_peak);
                         },
                         w.repeat);
  const double heads = double(w.heads) * o.layers * w.batch;
  result.causal_pairs = 0.5 * w.tokens * (w.tokens + 1.0) * heads;
  if (o.policy.empty()) {
    const RandomRoles roles = draw_roles(w, int64_t{o.layers} * w.kv_heads);
    result.live_pairs = double(roles.live_pairs) * w.heads / w.kv_heads * w.batch;
  }
  result.kv_end = double(end.live_keys) / double(full_end.live_keys);
  result.flop_per_pair = 4.0 * w.head_dim;
  report(context, result,
         {{"policy", ours()->spec()},
          {"tokens_per_s", 1000.0 * w.batch * w.tokens / result.times.ours.median()},
          {"kv_bytes_end", end.held_bytes},
          {"kv_bytes_peak", peak.held_bytes},
          {"baseline_kv_bytes_peak", full_peak.held_bytes}});
  std::printf("keys and values at their peak: %s of %s\n", bytes(peak.held_bytes).c_str(),
              bytes(full_peak.held_bytes).c_str());
}

}  // namespace

void add_bench_prefill(CLI::App& bench, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(
      bench, "prefill", "a prompt through a model with random weights against keeping every key",
      [o, &context] { run(*o, context); });
  add_workload_options(command, o->work);
  command.add_option("--layers", o->layers, "layers of the model")->check(CLI::Range(1, 1024));
  command.add_option("--prefill-chunk", o->chunk, "tokens of each sequence in a step")
      ->check(CLI::Range(1, 1 << 20));
  command.add_option("--policy", o->policy,
                     "who decides what is kept (see nats-lm policies); empty: the roles drawn");
}

}  // namespace natslm::cli
