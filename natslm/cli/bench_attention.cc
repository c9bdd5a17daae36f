// nats-lm bench attention: the attention operator against LibTorch's dense one, over any lists of
// lengths, shapes and role shares, on the CPU or a GPU.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "natslm/base/error.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/device.h"
#include "natslm/cli/table.h"
#include "natslm/kernels/crossover.h"
#include "natslm/ops/attention.h"
#include "natslm/roles/assign_roles.h"

namespace natslm::cli {

namespace {

using kernels::AttentionPath;
using kernels::Pass;

struct Options {
  Workload work;  // all but what the lists below replace
  std::vector<int32_t> tokens = {4096};
  std::vector<double> global = {0.11}, local = {0.03};
  std::vector<int32_t> window = {64};
  std::vector<std::string> shapes;  // "32/8/128": --heads, --kv-heads, --head-dim
  std::vector<std::string> baselines;
  std::string device = "cpu";
  std::string dtype, path;
  bool backward = false, crossover = false;
};

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

std::vector<std::string> path_names() {
  std::vector<std::string> names;
  for (const AttentionPath path : kernels::kAttentionPaths) names.emplace_back(name(path));
  return names;
}

std::vector<Workload> workloads(const Options& o) {
  std::vector<Workload> all;
  const std::vector<std::string> one_shape = {""};
  for (const std::string& shape : o.shapes.empty() ? one_shape : o.shapes) {
    for (const double global : o.global) {
      for (const double local : o.local) {
        for (const int32_t window : o.window) {
          for (const int32_t tokens : o.tokens) {
            Workload w = o.work;
            if (!shape.empty()) set_shape(w, shape);
            w.global_share = global;
            w.local_share = local;
            w.window = window;
            w.tokens = tokens;
            check(w);
            all.push_back(w);
          }
        }
      }
    }
  }
  return all;
}

std::string shape_name(const Workload& w) {
  return std::to_string(w.heads) + "/" + std::to_string(w.kv_heads) + "/" +
         std::to_string(w.head_dim);
}

// ------------------------------------------------------------------ one side

// Restricts LibTorch's attention to one of its kernels while it lives; "dense": any of them.
class OnlyKernel {
 public:
  explicit OnlyKernel(const std::string& name) : active_(name != "dense") {
    if (active_) set(name == "cudnn", name == "flash", name == "efficient", false);
  }
  ~OnlyKernel() {
    if (active_) set(true, true, true, true);
  }
  OnlyKernel(const OnlyKernel&) = delete;
  OnlyKernel& operator=(const OnlyKernel&) = delete;

 private:
  static void set(bool cudnn, bool flash, bool efficient, bool math) {
    at::Context& context = at::globalContext();
    context.setSDPUseCuDNN(cudnn);
    context.setSDPUseFlash(flash);
    context.setSDPUseMemEfficient(efficient);
    context.setSDPUseMath(math);
  }
  bool active_;
};

struct PassTimes {
  Timing forward, backward, both;  // the last two with --backward only
};

// What is timed: a forward pass over inputs, and the backward pass from a gradient.
struct Side {
  std::string name;
  std::function<at::Tensor()> forward;
  std::vector<at::Tensor> inputs;
  at::Tensor grad, kept;  // kept: an output whose graph stays, for backward alone

  void clear() const {
    for (const at::Tensor& x : inputs) x.mutable_grad() = at::Tensor();
  }
  void run_forward() const {
    const at::AutoGradMode off(false);
    forward();
  }
  void run_both() const {
    const at::AutoGradMode on(true);
    forward().backward(grad);
    clear();
  }
  void run_backward() const {
    kept.backward(grad, /*retain_graph=*/true);
    clear();
  }
  void prepare(bool backward) {
    if (!backward) return;
    const at::AutoGradMode on(true);
    kept = forward();
  }
};

// Times all sides in turn, first checking once that what they compute is finite.
std::vector<PassTimes> time_sides(std::vector<Side>& sides, bool backward, int32_t repeat,
                                  const c10::Device& device) {
  std::vector<std::function<void()>> calls;
  for (Side& side : sides) {
    {
      const at::AutoGradMode off(false);
      NATSLM_CHECK(at::isfinite(side.forward()).all().item<bool>(), side.name,
                   " computes what is not finite");
    }
    side.prepare(backward);
    calls.push_back([&side] { side.run_forward(); });
    if (!backward) continue;
    side.kept.backward(side.grad, true);
    for (const at::Tensor& x : side.inputs) {
      NATSLM_CHECK(at::isfinite(x.grad()).all().item<bool>(), side.name,
                   " computes a gradient that is not finite");
    }
    side.clear();
    calls.push_back([&side] { side.run_backward(); });
    calls.push_back([&side] { side.run_both(); });
  }
  std::vector<Timing> times = time_in_turn(calls, repeat, device);
  std::vector<PassTimes> result(sides.size());
  const size_t passes = backward ? 3 : 1;
  for (size_t i = 0; i < sides.size(); ++i) {
    result[i].forward = times[i * passes];
    if (!backward) continue;
    result[i].backward = times[i * passes + 1];
    result[i].both = times[i * passes + 2];
  }
  return result;
}

// ------------------------------------------------------------------ one problem

// Random tensors of a workload and what computes on them.
class Problem {
 public:
  Problem(const Workload& w, const c10::Device& device, bool backward)
      : work_(w), device_(device), backward_(backward) {
    q_ = normal(w.heads);
    k_ = normal(w.kv_heads);
    v_ = normal(w.kv_heads);
    grad_ = at::randn_like(q_.detach());
  }

  // The lifetimes of `roles` on the device, with an order of the keys; `path` for both passes.
  Side ours(const std::string& name, const RandomRoles& roles, std::optional<AttentionPath> path,
            double density) const {
    const Workload& w = work_;
    const auto shaped = [&](const at::Tensor& x, at::IntArrayRef sizes) {
      return x.view(sizes).to(device_);
    };
    const at::Tensor last = shaped(roles.last, {w.batch, w.kv_heads, w.tokens});
    ops::AttentionHints hints;
    hints.order = shaped(roles.order, {w.batch, w.kv_heads, w.tokens});
    hints.ends = shaped(roles.ends, {w.batch, w.kv_heads, kernels::KeyOrder::kSegments});
    hints.reach = roles.reach;
    hints.density = density;
    hints.forward_path = hints.backward_path = path;
    std::optional<ops::RoleInputs> role_inputs;
    std::vector<at::Tensor> inputs = {q_, k_, v_};
    if (backward_) {
      role_inputs.emplace();
      role_inputs->horizons = shaped(roles.horizons, {3, w.batch, w.kv_heads, w.tokens});
      role_inputs->onehot =
          at::randn({w.batch, w.kv_heads, w.tokens, 3}, at::TensorOptions().device(device_))
              .requires_grad_(true);
      inputs.push_back(role_inputs->onehot);
    }
    const at::Tensor q = q_, k = k_, v = v_;
    return {name,
            [=] {
              return ops::attention(q, k, v, last, std::nullopt, std::nullopt, role_inputs, false,
                                    hints)
                  .out;
            },
            inputs,
            grad_,
            {}};
  }

  // From score logits that give these roles to lifetimes and the order of the keys: what a model
  // does before its attention.
  std::function<void()> lifetimes(const RandomRoles& drawn) const {
    const Workload& w = work_;
    const at::Tensor chosen =
        drawn.roles.view({w.batch, w.kv_heads, w.tokens}).to(device_, at::kLong);
    const at::Tensor logits = at::one_hot(chosen, roles::kRoles)
                                  .permute({0, 2, 1, 3})
                                  .reshape({w.batch, w.tokens, roles::kRoles * w.kv_heads})
                                  .to(scalar_type(w));
    const roles::Options options = {.set = roles::RoleSet::kGls, .window = w.window, .chunk = 1};
    return [=] {
      const at::AutoGradMode off(false);
      roles::assign_roles(logits, options);
    };
  }

  // LibTorch's, with keys and values repeated for the heads of a group beforehand or left to
  // LibTorch: whichever is faster here. Nothing if it cannot compute this.
  std::optional<Side> dense(const std::string& name) const {
    std::optional<Side> best;
    double best_ms = 0;
    for (const bool repeated : {true, false}) {
      if (!repeated && work_.heads == work_.kv_heads) continue;
      Side side = dense(name, repeated);
      const auto call = [&] { backward_ ? side.run_both() : side.run_forward(); };
      try {
        call();
        const double ms = milliseconds(device_, call, 3);
        if (best && best_ms <= ms) continue;
        best_ms = ms;
        best = std::move(side);
      } catch (const c10::Error&) {
        continue;  // this variant is not to be had
      }
    }
    return best;
  }

 private:
  at::Tensor normal(int32_t heads) const {
    return at::randn({work_.batch, heads, work_.tokens, work_.head_dim},
                     at::TensorOptions().dtype(scalar_type(work_)).device(device_))
        .requires_grad_(backward_);
  }

  Side dense(const std::string& name, bool repeated) const {
    const auto own = [&](const at::Tensor& x, int64_t times) {
      return x.detach().repeat_interleave(times, 1).contiguous().requires_grad_(backward_);
    };
    const int64_t times = repeated ? work_.heads / work_.kv_heads : 1;
    const at::Tensor q = own(q_, 1), k = own(k_, times), v = own(v_, times);
    const bool grouped = !repeated;
    return {name,
            [=] {
              const OnlyKernel only(name);
              return at::scaled_dot_product_attention(q, k, v, {}, 0.0, true, std::nullopt,
                                                      grouped);
            },
            {q, k, v},
            grad_,
            {}};
  }

  Workload work_;
  c10::Device device_;
  bool backward_;
  at::Tensor q_, k_, v_, grad_;
};

// The path that the table gives a workload on this device; nothing on the CPU.
template <class Params>
std::optional<AttentionPath> table_path(const Workload& w, const c10::Device& device,
                                        double density) {
  if (!device.is_cuda()) return std::nullopt;
  static const int32_t some_order = 0;
  Params p;
  p.batch = w.batch;
  p.q_heads = w.heads;
  p.kv_heads = w.kv_heads;
  p.tokens = w.tokens;
  p.head_dim = w.head_dim;
  p.dtype = DType::kBFloat16;
  p.q_stride = p.k_stride = p.v_stride = p.out_stride = {w.head_dim, w.head_dim, w.head_dim};
  if constexpr (std::is_same_v<Params, kernels::AttentionBackward>) {
    p.dout_stride = p.dq_stride = p.dk_stride = p.dv_stride = p.q_stride;
  }
  p.sorted.order = p.sorted.ends = &some_order;
  return kernels::choose_path(p, density);
}

std::string name_of(const std::optional<AttentionPath>& path) {
  return path ? std::string(name(*path)) : "cpu";
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
    std::vector<std::string> cells = {
        shape_name(w), std::to_string(w.tokens), percent(work.pairs()), pass, path, fixed(own, 3),
        fixed(rate, 1)};
    std::string against;
    for (size_t i = 1; i < sides.size(); ++i) {
      const double ms = (times[i].*part).median();
      against += (i > 1 ? ", " : "") + sides[i].name + " " + fixed(ms, 3) + " (" +
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

// ------------------------------------------------------------------ the commands

void run_problem(const Workload& w, const Options& o, const c10::Device& device, Table& table,
                 Context& context) {
  const int64_t sets = int64_t{w.batch} * w.kv_heads;
  const RandomRoles roles = draw_roles(w, sets);
  const Work work = work_of(w, roles);
  const Problem problem(w, device, o.backward);
  const std::optional<AttentionPath> forced = kernels::attention_path(o.path);
  const std::string forward_path =
      name_of(forced ? forced : table_path<kernels::AttentionForward>(w, device, work.pairs()));
  const std::string backward_path =
      name_of(forced ? forced : table_path<kernels::AttentionBackward>(w, device, work.pairs()));

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
  if (w.uneven) {  // the same mean share in every head
    Workload even = w;
    even.uneven = false;
    even.global_share = 0;
    for (int32_t h = 0; h < w.kv_heads; ++h) even.global_share += global_share_of(w, h);
    even.global_share /= w.kv_heads;
    const RandomRoles even_roles = draw_roles(even, sets);
    even_work = work_of(even, even_roles);
    sides.push_back(problem.ours("even heads", even_roles, forced, even_work.pairs()));
  }
  const std::vector<PassTimes> times = time_sides(sides, o.backward, w.repeat, device);

  nlohmann::ordered_json more = {{"forward_path", forward_path}};
  if (o.backward) more["backward_path"] = backward_path;
  if (device.is_cuda()) more["clock_mhz"] = gpu_clock_mhz();
  more["lifetimes_ms"] = time_in_turn({problem.lifetimes(roles)}, w.repeat, device)[0].median();
  if (w.uneven) {
    const auto a_pair = [&](const PassTimes& t, const Work& done) {
      return (o.backward ? t.both : t.forward).median() / done.live_pairs;
    };
    more["uneven_over_even"] = a_pair(times[0], work) / a_pair(times.back(), even_work);
  }
  for (size_t i = 1; i < baselines; ++i) {
    write_result(context, w, o, work, times[0], sides[i].name, times[i], more);
  }
  add_rows(table, w, o, work, sides, times, forward_path, backward_path);
}

// Times every path that can run each workload, and prints where the best one changes as rows of
// kernels/crossover.cc. Tokens must ascend.
void measure_crossovers(const std::vector<Workload>& all, const Options& o,
                        const c10::Device& device, Context& context) {
  NATSLM_CHECK(device.is_cuda(), "--crossover compares GPU paths: add --device cuda");
  std::vector<std::string> columns = {"shape", "tokens", "alive", "pass"};
  for (const std::string& path : path_names()) columns.push_back(path);
  Table table(columns);
  std::string rows;
  std::optional<AttentionPath> best_before[2];
  std::string shape_before;
  for (const Workload& w : all) {
    const RandomRoles roles = draw_roles(w, int64_t{w.batch} * w.kv_heads);
    const Work work = work_of(w, roles);
    const Problem problem(w, device, o.backward);
    std::vector<Side> sides;
    std::vector<AttentionPath> paths;
    for (const AttentionPath path : kernels::kAttentionPaths) {
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
    const std::vector<PassTimes> times = time_sides(sides, o.backward, w.repeat, device);
    const std::string shape = shape_name(w) + percent(work.pairs(), 0);
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      if (pass == Pass::kBackward && !o.backward) continue;
      const auto ms = [&](size_t i) {
        return (pass == Pass::kForward ? times[i].forward : times[i].backward).median();
      };
      std::vector<std::string> cells = {shape_name(w), std::to_string(w.tokens),
                                        percent(work.pairs()), std::string(name(pass))};
      size_t best = 0;
      nlohmann::ordered_json line = {{"shape", shape_name(w)},
                                     {"tokens", w.tokens},
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
      std::string path_name(name(paths[best]));
      for (const auto& [from, to] : {std::pair{"cuda-", "kCuda"}, {"sm90-", "kSm90"}}) {
        if (path_name.starts_with(from)) path_name = to + path_name.substr(5);
      }
      path_name[5] = static_cast<char>(std::toupper(path_name[5]));
      rows += "    {" + std::string(pass == Pass::kForward ? "kForward" : "kBackward") + ", " +
              std::to_string(w.head_dim) + ", " + std::to_string(w.heads / w.kv_heads) + ", " +
              fixed(work.pairs(), 2) + ", " + std::to_string(w.tokens) + ", " + path_name + "},\n";
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
  const std::vector<Workload> all = workloads(o);
  if (o.crossover) return measure_crossovers(all, o, device, context);
  Table table({"shape", "tokens", "alive", "pass", "path", "ours ms",
               device.is_cuda() ? "TFLOP/s" : "GFLOP/s", "dense ms"});
  for (const Workload& w : all) run_problem(w, o, device, table, context);
  std::fputs(table.text().c_str(), stdout);
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
  command.add_option("--window", o->window, "queries that read a window token after its own")
      ->check(CLI::Range(0, 1 << 22));
  command.add_option("--shape", o->shapes,
                     "heads/kv-heads/head-dim, any number of them; instead of the three options");
  Workload& w = o->work;
  command.add_option("--heads", w.heads, "query heads")->check(CLI::Range(1, 1024));
  command.add_option("--kv-heads", w.kv_heads, "key/value heads")->check(CLI::Range(1, 1024));
  command.add_option("--head-dim", w.head_dim, "numbers in a head, a multiple of 8")
      ->check(CLI::Range(8, 256));
  command.add_option("--batch", w.batch, "sequences")->check(CLI::Range(1, 4096));
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
  command.add_option("--path", o->path, "GPU path to take; empty: the one of the crossover table")
      ->check(CLI::IsMember(path_names()));
  command.add_flag("--crossover", o->crossover,
                   "time every GPU path instead, and print rows of the crossover table");
}

}  // namespace natslm::cli
