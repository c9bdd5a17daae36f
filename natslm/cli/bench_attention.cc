// nats-lm bench attention: the attention operator against LibTorch's dense one, over any lists of
// lengths, shapes and role shares, on the CPU or a GPU.
// SPDX-License-Identifier: Apache-2.0
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "natslm/base/error.h"
#include "natslm/cli/attention_problem.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/device.h"
#include "natslm/cli/recorded_roles.h"
#include "natslm/cli/table.h"
#include "natslm/kernels/crossover.h"
#include "natslm/train/device.h"

namespace natslm::cli {

namespace {

using kernels::AttentionPath;
using kernels::Pass;

struct Options {
  Workload work;  // all but what the lists below replace
  std::vector<int32_t> tokens = {4096};
  std::vector<int32_t> batch = {1};  // 0: as many as make kTokensOfABatch tokens
  std::vector<double> global = {0.11}, local = {0.03};
  std::vector<double> density;  // shares of visible pairs, instead of `global`
  std::vector<int32_t> window = {64};
  std::vector<std::string> shapes;  // "32/8/128": --heads, --kv-heads, --head-dim
  std::vector<std::string> baselines;
  std::string device = "cpu";
  std::string dtype, path;
  std::string model;              // whose roles; empty: random ones
  std::vector<std::string> text;  // that it gives roles to
  bool backward = false, crossover = false, graph = false;
  SideTiming timing() const { return {backward, graph, work.repeat}; }
};

constexpr int32_t kTokensOfABatch = 16384;

// Forward multiplies twice (scores, outputs), backward five times; 2 * D operations each.
constexpr int kForwardProducts = 2;
constexpr int kBackwardProducts = 5;

// ------------------------------------------------------------------ the axes

void set_shape(Workload& w, const std::string& shape) {
  int read = 0;
  const bool right =
      std::sscanf(shape.c_str(), "%d/%d/%d%n", &w.heads, &w.kv_heads, &w.head_dim, &read) == 3 &&
      read == static_cast<int>(shape.size()) && w.heads > 0 && w.kv_heads > 0;
  if (!right) throw CLI::ValidationError("--shape", shape + " is not heads/kv-heads/head-dim");
}

std::vector<Workload> workloads(const Options& o) {
  std::vector<Workload> all;
  const std::vector<std::string> one_shape = {""};
  for (const std::string& shape : o.shapes.empty() ? one_shape : o.shapes) {
    for (const double global : o.density.empty() ? o.global : std::vector{0.0}) {
      for (const double local : o.local) {
        for (const int32_t window : o.window) {
          for (const int32_t batch : o.batch) {
            for (const int32_t tokens : o.tokens) {
              Workload w = o.work;
              if (!shape.empty()) set_shape(w, shape);
              w.global_share = global;
              w.local_share = local;
              w.window = window;
              w.batch = batch > 0 ? batch : std::max(1, kTokensOfABatch / tokens);
              w.tokens = tokens;
              check(w);
              all.push_back(w);
            }
          }
        }
      }
    }
  }
  if (o.density.empty()) return all;
  std::vector<Workload> of_density;
  for (const double density : o.density) {
    for (const Workload& w : all) of_density.push_back(with_density(w, density));
  }
  return of_density;
}

std::string shape_name(const Workload& w) {
  return std::to_string(w.heads) + "/" + std::to_string(w.kv_heads) + "/" +
         std::to_string(w.head_dim);
}

// ------------------------------------------------------------------ results

struct Work {
  double live_pairs = 0, causal_pairs = 0, kv_end = 0;
  double pairs() const { return live_pairs / causal_pairs; }
};

Work work_of(const Workload& w, const RandomRoles& roles) {
  return {.live_pairs = double(roles.live_pairs) * w.heads / w.kv_heads,
          .causal_pairs = 0.5 * w.tokens * (w.tokens + 1.0) * w.batch * w.heads,
          .kv_end = roles.kv_end};
}

double tflops(const Workload& w, int products, double pairs, double ms) {
  return 2.0 * w.head_dim * products * pairs / (ms * 1e9);
}

void write_result(Context& context, const Workload& w, const Options& o, const Work& work,
                  const PassTimes& ours, const std::string& baseline, const PassTimes& dense,
                  const nlohmann::ordered_json& more) {
  const Timing& time = o.backward ? ours.both : ours.forward;
  const Timing& other = o.backward ? dense.both : dense.forward;
  const int products = kForwardProducts + (o.backward ? kBackwardProducts : 0);
  nlohmann::ordered_json results = {
      {"shape", shape_name(w)},
      {"tokens", w.tokens},
      {"batch", w.batch},
      {"dtype", w.dtype},
      {"window", w.window},
      {"backward", o.backward},
      {"ours_ms", time.median()},
      {"baseline", baseline},
      {"baseline_ms", other.median()},
      {"speedup", other.median() / time.median()},
      {"live_pairs", work.live_pairs},
      {"pairs", work.pairs()},
      {"kv_end", work.kv_end},
      {"effective_tflops", tflops(w, products, work.live_pairs, time.median())},
      {"baseline_tflops", tflops(w, products, work.causal_pairs, other.median())},
      {"spread", std::max(time.spread(), other.spread())},
  };
  if (o.backward) {
    results["ours_forward_ms"] = ours.forward.median();
    results["ours_backward_ms"] = ours.backward.median();
    results["baseline_forward_ms"] = dense.forward.median();
    results["baseline_backward_ms"] = dense.backward.median();
  }
  results.update(more);
  context.write_json(results);
}

void add_rows(Table& table, const Workload& w, const Options& o, const Work& work,
              const std::vector<Side>& sides, const std::vector<PassTimes>& times,
              const std::string& forward_path, const std::string& backward_path) {
  const auto row = [&](const char* pass, const std::string& path, int products,
                       Timing PassTimes::*part) {
    const double own = (times[0].*part).median();
    // Of a CPU in GFLOP/s.
    const double rate =
        tflops(w, products, work.live_pairs, own) * (forward_path == "cpu" ? 1000 : 1);
    std::vector<std::string> cells = {shape_name(w),
                                      std::to_string(w.tokens),
                                      std::to_string(w.batch),
                                      percent(work.pairs()),
                                      pass,
                                      path,
                                      fixed(own, 4),
                                      fixed(rate, 1)};
    std::string against;
    for (size_t i = 1; i < sides.size(); ++i) {
      const double ms = (times[i].*part).median();
      against += (i > 1 ? ", " : "") + sides[i].name + " " + fixed(ms, 4) + " (" +
                 fixed(ms / own, 2) + "x)";
    }
    cells.push_back(against);
    table.add(cells);
  };
  row("forward", forward_path, kForwardProducts, &PassTimes::forward);
  if (!o.backward) return;
  row("backward", backward_path, kBackwardProducts, &PassTimes::backward);
  row("both", "", kForwardProducts + kBackwardProducts, &PassTimes::both);
}

// The largest time of ours beside the fastest dense kernel's, by how many pairs are visible: what
// "never much slower than dense" means. The aims are those of a GPU.
class SlowestBesideDense {
 public:
  void add(const char* pass, const Workload& w, double pairs, double ours_ms, double dense_ms) {
    const size_t kind = pairs < 0.5 ? 0 : pairs < 1 ? 1 : 2;
    Worst& worst = worst_[pass][kind];
    const double ratio = ours_ms / dense_ms;
    if (ratio <= worst.ratio) return;
    worst = {ratio, shape_name(w) + ", " + std::to_string(w.batch) + " x " +
                        std::to_string(w.tokens) + " tokens, " + percent(pairs) + " visible"};
  }
  void print(bool with_aims) const {
    constexpr const char* kKinds[] = {"below 50 % visible", "50 to 100 %", "all visible"};
    constexpr double kAims[] = {1.03, 1.2, 1.03};
    for (const auto& [pass, kinds] : worst_) {
      for (size_t kind = 0; kind < kinds.size(); ++kind) {
        if (kinds[kind].where.empty()) continue;
        std::printf("slowest beside dense, %s, %s: %.3fx its time%s at %s\n", pass.c_str(),
                    kKinds[kind], kinds[kind].ratio,
                    with_aims ? (" (aim " + fixed(kAims[kind], 2) + "x)").c_str() : "",
                    kinds[kind].where.c_str());
      }
    }
  }

 private:
  struct Worst {
    double ratio = 0;
    std::string where;
  };
  std::map<std::string, std::array<Worst, 3>> worst_;
};

// ------------------------------------------------------------------ the commands

// Adds how long it takes to make the lifetimes: launched and, on a GPU, recorded as a graph as in a
// model's step. (The host takes longer to launch one call than the device to do it.)
void add_lifetimes(const std::function<void()>& call, int32_t repeat, const c10::Device& device,
                   nlohmann::ordered_json& more) {
  const double launched = time_in_turn({call}, repeat, device)[0].median();
  if (!device.is_cuda()) {
    more["lifetimes_ms"] = launched;
    return;
  }
  constexpr int kCalls = 20;
  const c10::impl::VirtualGuardImpl streams(device.type());
  const c10::StreamGuard guard(streams.getStreamFromGlobalPool(device));
  const auto graph = train::record_launches([&] {
    for (int i = 0; i < kCalls; ++i) call();
  });
  const Timing replayed = time_in_turn({[&] { graph->replay(); }}, repeat, device)[0];
  more["lifetimes_ms"] = replayed.median() / kCalls;
  more["lifetimes_launched_ms"] = launched;
}

// What one run collects.
struct Report {
  Table table;
  SlowestBesideDense slowest;
};

// `even`: roles of the same mean shares in every head, to be timed beside `roles`.
void run_problem(const Workload& w, const RandomRoles& roles,
                 const std::optional<RandomRoles>& even, const Options& o,
                 const c10::Device& device, Report& out, Context& context) {
  const Work work = work_of(w, roles);
  const AttentionProblem problem(w, device, o.backward);
  const std::optional<AttentionPath> forced = kernels::attention_path(o.path);
  const auto path_of = [&](Pass pass) {
    return forced ? std::string(name(*forced)) : problem.path_name(pass, work.pairs());
  };
  const std::string forward_path = path_of(Pass::kForward),
                    backward_path = path_of(Pass::kBackward);

  std::vector<Side> sides = {problem.ours("ours", roles, forced, work.pairs())};
  for (const std::string& name : o.baselines) {
    if (std::optional<Side> dense = problem.dense(name)) {
      sides.push_back(std::move(*dense));
    } else {
      std::fprintf(stderr, "bench attention: %s cannot compute %s, %d tokens\n", name.c_str(),
                   shape_name(w).c_str(), w.tokens);
    }
  }
  NATSLM_CHECK(sides.size() > 1, "no baseline can compute ", shape_name(w), ", ", w.tokens,
               " tokens");
  const size_t baselines = sides.size();
  Work even_work;
  if (even) {
    even_work = work_of(w, *even);
    sides.push_back(problem.ours("even heads", *even, forced, even_work.pairs()));
  }
  const std::vector<PassTimes> times = time_sides(sides, o.timing(), device);

  nlohmann::ordered_json more = {{"forward_path", forward_path}};
  if (o.backward) more["backward_path"] = backward_path;
  if (device.is_cuda()) more["clock_mhz"] = gpu_clock_mhz();
  more["graph"] = o.graph;
  add_lifetimes(problem.lifetimes(roles), w.repeat, device, more);
  if (even) {
    const auto a_pair = [&](const PassTimes& t, const Work& done) {
      return (o.backward ? t.both : t.forward).median() / done.live_pairs;
    };
    more["uneven_over_even"] = a_pair(times[0], work) / a_pair(times.back(), even_work);
  }
  const auto compare_fastest = [&](const char* pass, Timing PassTimes::*part) {
    double fastest = (times[1].*part).median();
    for (size_t i = 2; i < baselines; ++i) fastest = std::min(fastest, (times[i].*part).median());
    out.slowest.add(pass, w, work.pairs(), (times[0].*part).median(), fastest);
  };
  compare_fastest("forward", &PassTimes::forward);
  if (o.backward) compare_fastest("forward and backward", &PassTimes::both);
  for (size_t i = 1; i < baselines; ++i) {
    write_result(context, w, o, work, times[0], sides[i].name, times[i], more);
  }
  add_rows(out.table, w, o, work, sides, times, forward_path, backward_path);
}

// The same mean share of Globals in every head.
RandomRoles even_roles(const Workload& w) {
  Workload even = w;
  even.uneven = false;
  even.global_share = 0;
  for (int32_t h = 0; h < w.kv_heads; ++h) even.global_share += global_share_of(w, h);
  even.global_share /= w.kv_heads;
  return draw_roles(even, int64_t{w.batch} * w.kv_heads);
}

// Times every path that can run each workload, and prints where the best one changes as rows of
// kernels/crossover.cc. Tokens must ascend.
void measure_crossovers(const std::vector<Workload>& all, const Options& o,
                        const c10::Device& device, Context& context) {
  NATSLM_CHECK(device.is_cuda(), "--crossover compares GPU paths: add --device cuda");
  std::vector<std::string> header = {"shape", "tokens", "batch", "alive", "pass"};
  for (const AttentionPath path : kernels::kAttentionPaths) header.emplace_back(name(path));
  Table table(header);
  std::string rows;
  std::optional<AttentionPath> best_before[2];
  std::string shape_before;
  for (const Workload& w : all) {
    const RandomRoles roles = draw_roles(w, int64_t{w.batch} * w.kv_heads);
    const Work work = work_of(w, roles);
    const AttentionProblem problem(w, device, o.backward);
    std::vector<Side> sides;
    std::vector<AttentionPath> paths;
    for (const AttentionPath path : kernels::kAttentionPaths) {
      if (path == AttentionPath::kLibrary && !every_key(w)) continue;
      Side side = problem.ours(std::string(name(path)), roles, path, work.pairs());
      try {
        o.backward ? side.run_both() : side.run_forward();
        sides.push_back(std::move(side));
        paths.push_back(path);
      } catch (const c10::Error&) {
        continue;  // not in this build or not on this device
      }
    }
    NATSLM_CHECK(!sides.empty(), "no GPU path can compute ", shape_name(w));
    const std::vector<PassTimes> times = time_sides(sides, o.timing(), device);
    const std::string shape = shape_name(w) + percent(work.pairs(), 0);
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      if (pass == Pass::kBackward && !o.backward) continue;
      const auto ms = [&](size_t i) {
        return (pass == Pass::kForward ? times[i].forward : times[i].backward).median();
      };
      std::vector<std::string> cells = {shape_name(w), std::to_string(w.tokens),
                                        std::to_string(w.batch), percent(work.pairs()),
                                        std::string(name(pass))};
      size_t best = 0;
      nlohmann::ordered_json line = {{"shape", shape_name(w)},
                                     {"tokens", w.tokens},
                                     {"batch", w.batch},
                                     {"pairs", work.pairs()},
                                     {"pass", name(pass)}};
      for (const AttentionPath path : kernels::kAttentionPaths) {
        const auto place = std::find(paths.begin(), paths.end(), path);
        if (place == paths.end()) {
          cells.push_back("-");
          continue;
        }
        const auto i = static_cast<size_t>(place - paths.begin());
        cells.push_back(fixed(ms(i), 3));
        line[std::string(name(path)) + "_ms"] = ms(i);
        if (ms(i) < ms(best)) best = i;
      }
      table.add(cells);
      context.write_json(line);
      std::optional<AttentionPath>& before = best_before[static_cast<int>(pass)];
      if (before == paths[best] && shape == shape_before) continue;
      before = paths[best];
      // "sm90-sorted" -> "kSm90Sorted"
      std::string path_name = "k";
      bool upper = true;
      for (const char c : name(paths[best])) {
        if (c != '-') path_name += upper ? static_cast<char>(std::toupper(c)) : c;
        upper = c == '-';
      }
      rows += "    {" + std::string(pass == Pass::kForward ? "kForward" : "kBackward") + ", " +
              std::to_string(w.head_dim) + ", " + std::to_string(w.heads / w.kv_heads) + ", " +
              fixed(work.pairs(), 2) + ", " + std::to_string(w.tokens) + ", " + path_name +
              (every_key(w) ? ", true" : "") + "},\n";
    }
    shape_before = shape;
  }
  std::fputs(table.text().c_str(), stdout);
  std::printf("the fastest, as rows of kernels/crossover.cc:\n%s", rows.c_str());
}

void run(Options o, Context& context) {
  const c10::Device device = device_from(o.device);
  context.measured_on(device);
  o.work.dtype = !o.dtype.empty() ? o.dtype : device.is_cuda() ? "bfloat16" : "float32";
  if (o.baselines.empty()) {
    o.baselines = device.is_cuda() ? std::vector<std::string>{"cudnn", "flash"}
                                   : std::vector<std::string>{"dense"};
  }
  NATSLM_CHECK(!o.graph || device.is_cuda(), "--graph records GPU launches: add --device cuda");
  // Launches cannot be recorded on the default stream.
  std::optional<c10::StreamGuard> stream;
  if (o.graph) {
    stream.emplace(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device));
  }
  const std::vector<Workload> all = workloads(o);
  for (const Workload& w : all) {
    if (o.path != "library" || every_key(w)) continue;
    throw CLI::ValidationError("--path", "library reads every key: it needs --global 1 --local 0");
  }
  if (o.crossover) return measure_crossovers(all, o, device, context);
  Report out{Table({"shape", "tokens", "batch", "alive", "pass", "path", "ours ms",
                    device.is_cuda() ? "TFLOP/s" : "GFLOP/s", "dense ms"}),
             {}};
  for (const Workload& w : all) {
    if (!o.model.empty()) {
      const RecordedRoles recorded = record_roles(o.model, o.text, w, device);
      check(recorded.work);
      run_problem(recorded.work, recorded.lifetimes(), recorded.even(), o, device, out, context);
      continue;
    }
    run_problem(w, draw_roles(w, int64_t{w.batch} * w.kv_heads),
                w.uneven ? std::optional(even_roles(w)) : std::nullopt, o, device, out, context);
  }
  std::fputs(out.table.text().c_str(), stdout);
  out.slowest.print(device.is_cuda());
}

}  // namespace

void add_bench_attention(CLI::App& bench, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(bench, "attention",
                                  "attention over whole sequences against dense (LibTorch's SDPA)",
                                  [o, &context] { run(*o, context); });
  command.add_option("--tokens", o->tokens, "lengths of the sequences, tokens")
      ->check(CLI::Range(1, 1 << 22));
  command.add_option("--global", o->global, "shares of Global tokens")->check(CLI::Range(0., 1.));
  command.add_option("--local", o->local, "shares of Local tokens")->check(CLI::Range(0., 1.));
  command
      .add_option("--density", o->density,
                  "shares of visible pairs, instead of --global: takes the share of Globals that "
                  "gives them (and a shorter window if the window alone gives more)")
      ->check(CLI::Range(0.001, 1.));
  command.add_option("--window", o->window, "queries that read a window token after its own")
      ->check(CLI::Range(0, 1 << 22));
  command.add_option("--shape", o->shapes,
                     "heads/kv-heads/head-dim, any number of them; instead of the three options");
  Workload& w = o->work;
  command.add_option("--heads", w.heads, "query heads")->check(CLI::Range(1, 1024));
  command.add_option("--kv-heads", w.kv_heads, "key/value heads")->check(CLI::Range(1, 1024));
  command.add_option("--head-dim", w.head_dim, "numbers in a head, a multiple of 8")
      ->check(CLI::Range(8, 256));
  command
      .add_option("--batch", o->batch,
                  "sequences, any number of times; 0: as many as make 16,384 tokens")
      ->check(CLI::Range(0, 4096));
  command.add_option("--dtype", o->dtype, "of queries, keys and values; empty: the device's usual")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command.add_option("--repeat", w.repeat, "measurements of each side, taken in turn")
      ->check(CLI::Range(1, 10000));
  command.add_option("--seed", w.seed, "of the roles drawn");
  command.add_flag("--uneven", w.uneven,
                   "one KV head has 60 % Globals, the others 2 to 10 %; also timed with the same "
                   "share in every head");
  command.add_flag("--backward", o->backward, "time the backward pass with the role sums, too");
  add_device_option(command, o->device);
  command
      .add_option("--baseline", o->baselines,
                  "dense attention to time beside ours; empty: cudnn,flash on a GPU, else dense")
      ->delimiter(',')
      ->check(CLI::IsMember({"dense", "cudnn", "flash", "efficient"}));
  std::vector<std::string> paths;
  for (const AttentionPath path : kernels::kAttentionPaths) paths.emplace_back(name(path));
  command
      .add_option("--path", o->path,
                  "GPU path to take; empty: the one of the crossover table; library: only with "
                  "--global 1, when every key is visible")
      ->check(CLI::IsMember(paths));
  command.add_flag("--graph", o->graph,
                   "time recorded launches, without what the host needs to start each (GPU)");
  CLI::Option* model = command.add_option(
      "--roles-of", o->model,
      "folder of a trained model: its roles for --text in all layers, instead of random ones; also "
      "timed with their mean shares in every head");
  model->needs(command.add_option("--text", o->text, "what --roles-of reads: files or folders"));
  command.add_flag("--crossover", o->crossover,
                   "time every GPU path instead, and print rows of the crossover table");
}

}  // namespace natslm::cli
