// What the benchmarks share: their options, random roles, and two sides timed in turn in one run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "natslm/cli/command.h"
#include "natslm/roles/roles.h"

namespace natslm::cli {

// Sizes and role shares of a benchmark.
struct Workload {
  int32_t tokens = 4096;
  int32_t batch = 1;
  int32_t heads = 9;
  int32_t kv_heads = 3;
  int32_t head_dim = 64;
  double global_share = 0.11;
  double local_share = 0.03;
  int32_t window = 64;
  // KV head 0 of each sequence has 60 % Globals, the others 2 to 10 %; global_share is unused.
  bool uneven = false;
  std::string dtype = "float32";
  int32_t repeat = 7;
  uint64_t seed = 1;
};

// Adds the options above to a benchmark's command.
void add_workload_options(CLI::App& command, Workload& workload);
// Throws CLI::ValidationError if sizes and shares do not fit together.
void check(const Workload& workload);
at::ScalarType scalar_type(const Workload& workload);

// Share of Globals in set `set`.
double global_share_of(const Workload& workload, int64_t set);

// The role of token `position` in set `set` (a KV head of a sequence or layer): a pure function, so
// that every benchmark and every order of asking draws the same. Token 0 is Global.
roles::Role draw_role(const Workload& workload, int32_t position, int64_t set);

// Roles drawn at random and independently for each token of each KV head (the uneven, unaligned
// worst case for a kernel), or given ones.
struct RandomRoles {
  at::Tensor roles;        // [sets, T] int8
  at::Tensor last;         // [sets, T] int32: lifetimes, one set for each sequence and KV head
  at::Tensor horizons;     // [3, sets, T] int32: under each role
  at::Tensor order, ends;  // [sets, T], [sets, 3] int32: the keys as kernels::KeyOrder has them
  int32_t reach = 0;
  int64_t live_pairs = 0;  // over all sets
  double kv_end = 0;       // share of the keys that the last token reads, mean over sets
};
RandomRoles draw_roles(const Workload& workload, int64_t sets);
// The same from given roles: role_at(position, set).
RandomRoles roles_from(const Workload& workload, int64_t sets,
                       const std::function<roles::Role(int32_t, int64_t)>& role_at);

// Share of the causal pairs that random roles of these shares leave visible, in the mean.
double expected_pairs(const Workload& workload);
// The same workload with a share of Globals that leaves about `density` of the pairs visible; with
// a shorter window, and then fewer Locals, if they alone leave more.
Workload with_density(Workload workload, double density);

// Milliseconds of one side, one number a repeat.
struct Timing {
  std::vector<double> ms;
  double median() const;
  double spread() const;  // middle half of the repeats / median
};

// All sides in turn in one run, `repeat` times after a warm-up, so that what else the machine does
// meets all. Calls that take less than 20 ms are timed several at once.
std::vector<Timing> time_in_turn(const std::vector<std::function<void()>>& sides, int32_t repeat,
                                 const c10::Device& device = c10::Device(c10::kCPU));

// Two sides.
struct Comparison {
  Timing ours, baseline;
  double speedup() const { return baseline.median() / ours.median(); }
};
Comparison compare(const std::function<void()>& ours, const std::function<void()>& baseline,
                   int32_t repeat, const c10::Device& device = c10::Device(c10::kCPU));

// What every benchmark reports.
struct BenchResult {
  std::string baseline;  // its name
  Comparison times;
  double live_pairs = 0;    // (query, key) pairs visible, over query heads and sequences
  double causal_pairs = 0;  // the same with every key alive
  double kv_end = 0;
  double flop_per_pair = 0;  // of ours and the baseline alike
};

// Prints the table and writes the JSON line; `more` is added to its results.
void report(Context& context, const BenchResult& result, const nlohmann::ordered_json& more);

}  // namespace natslm::cli
