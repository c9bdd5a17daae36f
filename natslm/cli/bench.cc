// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/bench.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "natslm/base/counter_rng.h"
#include "natslm/base/lifetime.h"
#include "natslm/cli/device.h"
#include "natslm/cli/table.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/roles/lifetimes.h"

namespace natslm::cli {

namespace {

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const double place = share * double(values.size() - 1);
  const size_t low = static_cast<size_t>(place);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (place - double(low)) * (values[high] - values[low]);
}

// Warms up and says how many calls make one measurement of at least 20 ms.
int64_t calls_per_sample(const std::function<void()>& call, const c10::Device& device) {
  milliseconds(device, call, 1);
  return std::max<int64_t>(1, std::llround(20.0 / std::max(milliseconds(device, call, 1), 1e-3)));
}

}  // namespace

void add_workload_options(CLI::App& command, Workload& w) {
  command.add_option("--tokens", w.tokens, "length of each sequence, tokens")
      ->check(CLI::Range(1, 1 << 22));
  command.add_option("--batch", w.batch, "sequences")->check(CLI::Range(1, 4096));
  command.add_option("--heads", w.heads, "query heads")->check(CLI::Range(1, 1024));
  command.add_option("--kv-heads", w.kv_heads, "key/value heads")->check(CLI::Range(1, 1024));
  command.add_option("--head-dim", w.head_dim, "numbers in a head, a multiple of 8")
      ->check(CLI::Range(8, 256));
  command.add_option("--global", w.global_share, "share of Global tokens")
      ->check(CLI::Range(0., 1.));
  command.add_option("--local", w.local_share, "share of Local tokens")->check(CLI::Range(0., 1.));
  command.add_option("--window", w.window, "queries that read a window token after its own")
      ->check(CLI::Range(0, 1 << 22));
  command.add_option("--dtype", w.dtype, "of queries, keys and values")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command.add_option("--repeat", w.repeat, "measurements of each side, taken in turn")
      ->check(CLI::Range(1, 10000));
  command.add_option("--seed", w.seed, "of the roles drawn");
}

void check(const Workload& w) {
  if (w.heads % w.kv_heads != 0) {
    throw CLI::ValidationError(
        "--heads",
        std::to_string(w.heads) + " is not a multiple of --kv-heads " + std::to_string(w.kv_heads));
  }
  if (w.head_dim % 8 != 0) {
    throw CLI::ValidationError("--head-dim",
                               std::to_string(w.head_dim) + " is not a multiple of 8");
  }
  if (w.global_share + w.local_share > 1) {
    throw CLI::ValidationError("--global",
                               "the shares of --global and --local add up to more than 1");
  }
}

at::ScalarType scalar_type(const Workload& workload) {
  return workload.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

double global_share_of(const Workload& w, int64_t set) {
  constexpr double kMost = 0.6, kLeast = 0.02, kRest = 0.1;
  if (!w.uneven) return w.global_share;
  const int64_t head = set % w.kv_heads;
  if (head == 0) return kMost;
  return w.kv_heads == 2 ? kLeast
                         : kLeast + (kRest - kLeast) * double(head - 1) / double(w.kv_heads - 2);
}

roles::Role draw_role(const Workload& w, int32_t position, int64_t set) {
  const auto words = philox({static_cast<uint32_t>(w.seed), static_cast<uint32_t>(w.seed >> 32)},
                            {static_cast<uint32_t>(position), static_cast<uint32_t>(set), 0, 0});
  const double u = open_unit(words[0]);
  const double global = global_share_of(w, set);
  if (position == 0 || u < global) return roles::kGlobal;
  return u < global + w.local_share ? roles::kLocal : roles::kSliding;
}

RandomRoles draw_roles(const Workload& w, int64_t sets) {
  return roles_from(w, sets, [&](int32_t j, int64_t set) { return draw_role(w, j, set); });
}

RandomRoles roles_from(const Workload& w, int64_t sets,
                       const std::function<roles::Role(int32_t, int64_t)>& role_at) {
  const roles::Options options = {.set = roles::RoleSet::kGls, .window = w.window, .chunk = 1};
  const size_t tokens = static_cast<size_t>(w.tokens);
  RandomRoles drawn;
  drawn.last = at::empty({sets, w.tokens}, at::kInt);
  drawn.horizons = at::empty({roles::kRoles, sets, w.tokens}, at::kInt);
  drawn.order = at::empty({sets, w.tokens}, at::kInt);
  drawn.ends = at::empty({sets, kernels::KeyOrder::kSegments}, at::kInt);
  drawn.roles = at::empty({sets, w.tokens}, at::kChar);
  drawn.reach = roles::key_reach(options);
  std::vector<int8_t> role(tokens);
  int64_t alive_at_end = 0;
  for (int64_t set = 0; set < sets; ++set) {
    for (int32_t j = 0; j < w.tokens; ++j) role[j] = role_at(j, set);
    int32_t* last = drawn.last.mutable_data_ptr<int32_t>() + set * w.tokens;
    roles::LifetimeRows rows{.last = {last, tokens}, .horizon = {}};
    for (int r = 0; r < roles::kRoles; ++r) {
      rows.horizon[r] = {drawn.horizons.mutable_data_ptr<int32_t>() + (r * sets + set) * w.tokens,
                         tokens};
    }
    roles::write_lifetimes(role, w.tokens, options, rows);
    roles::write_key_order(
        {last, tokens}, drawn.reach,
        {drawn.order.mutable_data_ptr<int32_t>() + set * w.tokens, tokens},
        {drawn.ends.mutable_data_ptr<int32_t>() + set * kernels::KeyOrder::kSegments,
         kernels::KeyOrder::kSegments});
    std::copy(role.begin(), role.end(), drawn.roles.mutable_data_ptr<int8_t>() + set * w.tokens);
    for (int32_t j = 0; j < w.tokens; ++j) {
      drawn.live_pairs += queries_served(j, last[j], w.tokens);
      alive_at_end += visible(w.tokens - 1, j, last[j]);
    }
  }
  drawn.kv_end = double(alive_at_end) / (double(sets) * w.tokens);
  return drawn;
}

double expected_pairs(const Workload& w) {
  const double g = w.global_share, rest = 1 - g - w.local_share;
  double pairs = w.tokens;  // token 0 is Global
  double quiet = 1;         // (1 - g)^later: none of the later tokens is Global
  for (int32_t later = 0; later < w.tokens - 1; ++later) {
    // A Local is read by every query up to the next Global.
    const double local = 1 + (g > 0 ? (1 - quiet) / g : later);
    pairs += g * (later + 1) + w.local_share * local + rest * (std::min(w.window, later) + 1);
    quiet *= 1 - g;
  }
  return pairs / (0.5 * w.tokens * (w.tokens + 1.0));
}

Workload with_density(Workload w, double density) {
  w.uneven = false;
  w.global_share = 0;
  if (density >= 1) {
    w.global_share = 1;
    w.local_share = 0;
    return w;
  }
  while (w.window > 0 && expected_pairs(w) > density) w.window /= 2;
  // While no Global follows, Locals are as good as Globals.
  while (w.local_share > 1e-4 && expected_pairs(w) > density) w.local_share /= 2;
  double low = 0, high = 1 - w.local_share;
  for (int i = 0; i < 40; ++i) {
    w.global_share = 0.5 * (low + high);
    (expected_pairs(w) < density ? low : high) = w.global_share;
  }
  return w;
}

double Timing::median() const {
  return quantile(ms, 0.5);
}

double Timing::spread() const {
  return (quantile(ms, 0.75) - quantile(ms, 0.25)) / median();
}

std::vector<Timing> time_in_turn(const std::vector<std::function<void()>>& sides, int32_t repeat,
                                 const c10::Device& device) {
  std::vector<int64_t> calls;
  for (const auto& side : sides) calls.push_back(calls_per_sample(side, device));
  std::vector<Timing> times(sides.size());
  for (int32_t r = 0; r < repeat; ++r) {
    for (size_t i = 0; i < sides.size(); ++i) {
      times[i].ms.push_back(milliseconds(device, sides[i], calls[i]) / double(calls[i]));
    }
  }
  return times;
}

Comparison compare(const std::function<void()>& ours, const std::function<void()>& baseline,
                   int32_t repeat, const c10::Device& device) {
  std::vector<Timing> times = time_in_turn({ours, baseline}, repeat, device);
  return {std::move(times[0]), std::move(times[1])};
}

void report(Context& context, const BenchResult& r, const nlohmann::ordered_json& more) {
  const auto tflops = [&](double pairs, const Timing& time) {
    return r.flop_per_pair * pairs / (time.median() * 1e9);
  };
  Table table({"", "ms (median)", "spread", "effective GFLOP/s"});
  const auto row = [&](const std::string& name, const Timing& time, double pairs) {
    table.add({name, fixed(time.median(), 3), percent(time.spread()),
               fixed(1000 * tflops(pairs, time), 1)});
  };
  row("ours", r.times.ours, r.live_pairs);
  row(r.baseline, r.times.baseline, r.causal_pairs);
  std::fputs(table.text().c_str(), stdout);
  std::printf("%s alive pairs, %s of the keys alive at the end: %.2fx as fast as %s\n",
              percent(r.live_pairs / r.causal_pairs).c_str(), percent(r.kv_end).c_str(),
              r.times.speedup(), r.baseline.c_str());
  nlohmann::ordered_json results = {
      {"ours_ms", r.times.ours.median()},
      {"baseline", r.baseline},
      {"baseline_ms", r.times.baseline.median()},
      {"speedup", r.times.speedup()},
      {"live_pairs", r.live_pairs},
      {"pairs", r.live_pairs / r.causal_pairs},
      {"kv_end", r.kv_end},
      {"effective_tflops", tflops(r.live_pairs, r.times.ours)},
      {"baseline_tflops", tflops(r.causal_pairs, r.times.baseline)},
      {"spread", std::max(r.times.ours.spread(), r.times.baseline.spread())},
  };
  results.update(more);
  context.write_json(results);
}

}  // namespace natslm::cli
