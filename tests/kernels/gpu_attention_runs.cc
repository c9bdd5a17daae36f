// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/gpu_attention_runs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <memory>
#include <set>
#include <span>
#include <sstream>
#include <thread>

#include "natslm/base/error.h"
#include "natslm/base/parallel.h"
#include "tests/support/isolated.h"

namespace natslm::test {
namespace {

constexpr int kStopAfter = 3;   // failing problems of a combination
constexpr size_t kBatch = 256;  // problems prepared at a time: some 14 MB each
constexpr size_t kManyProblems = 2000;
constexpr size_t kBatchOfMany = 512;  // starting the device costs each combination a second a batch

// ------------------------------------------------------------------ what is tested

// "" or why the backend cannot even take one token here: this build or this device lacks it.
std::string missing(const Combination& combination) {
  const IsolatedResult result = run_isolated(
      [&](Messages& messages) {
        const AttentionBackend& backend = *combination.backend;
        if (combination.backward) {
          auto p = one_token<kernels::AttentionBackward>();
          p.dout_stride = p.dq_stride = p.dk_stride = p.dv_stride = p.q_stride;
          messages.note(std::string(backend.backward_why_not(p)));
        } else {
          messages.note(
              std::string(backend.forward_why_not(one_token<kernels::AttentionForward>())));
        }
      },
      kPatience);
  return result.notes.empty() ? "its why_not does not answer" : result.notes[0];
}

// Everything there is to run: on the GPU, or the CPU kernels where there is none.
const std::vector<Combination>& combinations() {
  static const std::vector<Combination> all = [] {
    std::vector<Combination> found;
    if (!no_gpu().empty()) {
      found = {{&kCpuBackend, false, false}, {&kCpuBackend, true, false}};
      return found;
    }
    const char* only = std::getenv("NATSLM_GPU_ONLY");
    for (const AttentionBackend* backend :
         {&kCudaBackend, &kSm90Backend, &kSm90ShortBackend, &kSm90WholeBackend}) {
      for (const bool backward : {false, true}) {
        for (const bool sorted : {false, true}) {
          const bool whole = backend == &kSm90WholeBackend;
          if (sorted && (whole || is_short(*backend))) continue;  // they know no order
          if (backward && !backend->backward) continue;
          const Combination combination{backend, backward, sorted};
          if (only && combination.name().find(only) == std::string::npos) continue;
          const std::string reason = missing(combination);
          if (reason.empty()) {
            found.push_back(combination);
          } else {
            std::printf("*** SKIPPED: %s: %s ***\n", combination.name().c_str(), reason.c_str());
          }
        }
      }
    }
    return found;
  }();
  return all;
}

// Names of combinations that failed already and get no further problems.
std::set<std::string>& given_up() {
  static std::set<std::string> names;
  return names;
}

std::unique_ptr<Memory> memory_of(const Combination& combination) {
  return combination.backend->on_gpu ? gpu_memory() : host_memory();
}

// ------------------------------------------------------------------ one problem

struct Prepared {
  explicit Prepared(const AttentionCase& c, const BackwardOptions& options = {})
      : problem(c, options) {
    const auto memory = host_memory();
    const RunOptions with_mass{.mass = true};
    reference = run_forward(problem, *memory, kReferenceBackend, with_mass);
    forward = {{"out", c.dtype, c.q_heads, c.tokens, c.head_dim, reference.out, {}},
               {"lse", DType::kFloat32, c.q_heads, c.tokens, 1, reference.lse, {}},
               {"mass", DType::kFloat32, c.kv_heads, c.tokens, 1, reference.mass, {}}};
    // Mass is made of the stored log-sum-exp, whose own rounding no kernel can take back.
    float largest = 0;
    for (const double lse : reference.lse) {
      if (std::isfinite(lse)) largest = std::max(largest, static_cast<float>(std::abs(lse)));
    }
    forward[2].plain.push_back(reference.mass);
    for (double& mass : forward[2].plain.back()) mass *= 1 + largest * 0x1p-24;
    const BackwardOutputs truth = run_backward(problem, reference, *memory, kReferenceBackend);
    backward = {{"dq", c.dtype, c.q_heads, c.tokens, c.head_dim, truth.dq, {}},
                {"dk", c.dtype, c.kv_heads, c.tokens, c.head_dim, truth.dk, {}},
                {"dv", c.dtype, c.kv_heads, c.tokens, c.head_dim, truth.dv, {}},
                {"role_sums", DType::kFloat32, c.kv_heads, c.tokens, 1, truth.role_sums, {}}};
    for (const AttentionBackend* plain :
         {&kPlainBackend, &kPlainAgainBackend, &kMatrixUnitBackends[0], &kMatrixUnitBackends[1],
          &kMatrixUnitBackends[2]}) {
      const ForwardOutputs f = run_forward(problem, *memory, *plain, with_mass);
      forward[0].plain.push_back(f.out);
      forward[1].plain.push_back(f.lse);
      forward[2].plain.push_back(f.mass);
      const BackwardOutputs b = run_backward(problem, reference, *memory, *plain);
      backward[0].plain.push_back(b.dq);
      backward[1].plain.push_back(b.dk);
      backward[2].plain.push_back(b.dv);
      backward[3].plain.push_back(b.role_sums);
    }
  }

  std::string describe() const {
    const BackwardOptions& o = problem.options;
    std::ostringstream text;
    text << problem.inputs.problem.describe() << ", reach " << problem.order.reach << ", "
         << o.horizon_count << " horizons" << (o.causal_role_normaliser ? ", causal role_lse" : "")
         << (o.limit_factor ? "" : ", factor not limited");
    if (!problem.inputs.lengths.empty()) {
      text << ", lengths " << list(problem.inputs.lengths);
    }
    return text.str();
  }

  DeviceProblem problem;
  ForwardOutputs reference;  // what the backward pass starts from
  std::vector<Expected> forward, backward;
};

std::string check_forward(const Prepared& p, Memory& memory, const Combination& combination,
                          Shares& shares) {
  if (!is_made_for(combination, p.problem.inputs.problem.head_dim)) return "";
  const auto run = [&](bool mass, uint8_t workspace) {
    return run_forward(p.problem, memory, *combination.backend,
                       {.sorted = combination.sorted, .mass = mass, .workspace = workspace});
  };
  const ForwardOutputs first = run(false, 0xff);
  if (!first.refused.empty()) return "refused: " + first.refused;
  std::string text = judge({{&p.forward[0], &first.out}, {&p.forward[1], &first.lse}}, shares);
  if (!first.damage.empty()) text += "\n  " + first.damage;
  if (!text.empty()) return text;  // what follows would only repeat it

  const ForwardOutputs second = run(true, 0x00), third = run(true, 0xff);
  if (!second.refused.empty()) return "with mass: refused: " + second.refused;
  if (!second.damage.empty()) text += "\n  with mass: " + second.damage;
  text += judge({{&p.forward[2], &second.mass}}, shares);
  if (!identical(first.out, second.out)) text += "\n  out: other bits the second time";
  if (!identical(first.lse, second.lse)) text += "\n  lse: other bits the second time";
  if (!identical(second.mass, third.mass)) text += "\n  mass: other bits the second time";
  return text;
}

std::string check_backward(const Prepared& p, Memory& memory, const Combination& combination,
                           Shares& shares) {
  if (!is_made_for(combination, p.problem.inputs.problem.head_dim)) return "";
  const auto run = [&](uint8_t workspace) {
    return run_backward(p.problem, p.reference, memory, *combination.backend,
                        {.sorted = combination.sorted, .mass = false, .workspace = workspace});
  };
  const BackwardOutputs first = run(0xff);
  if (!first.refused.empty()) return "refused: " + first.refused;
  std::string text = judge({{&p.backward[0], &first.dq},
                            {&p.backward[1], &first.dk},
                            {&p.backward[2], &first.dv},
                            {&p.backward[3], &first.role_sums}},
                           shares);
  if (!first.damage.empty()) text += "\n  " + first.damage;
  if (!text.empty()) return text;
  const BackwardOutputs second = run(0x00);
  if (!identical(first.dq, second.dq)) text += "\n  dq: other bits the second time";
  if (!identical(first.dk, second.dk)) text += "\n  dk: other bits the second time";
  if (!identical(first.dv, second.dv)) text += "\n  dv: other bits the second time";
  if (!identical(first.role_sums, second.role_sums)) {
    text += "\n  role_sums: other bits the second time";
  }
  return text;
}

// ------------------------------------------------------------------ many problems

struct Outcome {
  IsolatedResult result;
  double seconds = 0;
};

Outcome run_combination(const Combination& combination, const std::vector<Problem>& problems,
                        int patience) {
  const auto begin = std::chrono::steady_clock::now();
  Outcome outcome;
  outcome.result = run_isolated(
      [&](Messages& messages) {
        messages.doing("starting the device");
        const auto memory = memory_of(combination);
        Shares shares;
        int failed = 0;
        for (const Problem& problem : problems) {
          messages.doing(problem.description);
          const std::string wrong = problem.check(*memory, combination, shares);
          if (wrong.empty()) continue;
          messages.failed(wrong + "\n  " + problem.description);
          if (++failed == kStopAfter) {
            messages.failed("stopped: the other problems were not run");
            break;
          }
        }
        std::ostringstream text;
        text.precision(2);
        for (const auto& [output, share] : shares) text << " " << output << " " << share;
        messages.note(text.str());
      },
      patience);
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return outcome;
}

using PreparedCases = std::vector<std::unique_ptr<Prepared>>;

PreparedCases prepare(std::span<const CaseWithOptions> cases) {
  PreparedCases prepared(cases.size());
  plain_threads(threads())(std::ssize(cases), [&](int64_t i, int) {
    prepared[i] = std::make_unique<Prepared>(cases[i].problem, cases[i].options);
  });
  return prepared;
}

}  // namespace

bool is_short(const AttentionBackend& backend) {
  return &backend == &kSm90ShortBackend;
}

bool is_made_for(const Combination& combination, int head_dim) {
  return head_dim <= 128 || combination.backend == &kCudaBackend || !combination.backend->on_gpu;
}

const std::string& no_gpu() {
  static const std::string reason = [] {
    const IsolatedResult result =
        run_isolated([](Messages& messages) { messages.note(describe_gpu()); }, kPatience);
    const std::string text =
        result.notes.empty() ? "no: the driver does not answer" : result.notes[0];
    if (!text.starts_with("no: ")) {
      std::printf("GPU: %s\n", text.c_str());
      return std::string();
    }
    std::printf("\n*** GPU TESTS SKIPPED: %s ***\n\n", text.substr(4).c_str());
    return text.substr(4);
  }();
  return reason;
}

int threads() {
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::string judge(const std::vector<std::pair<const Expected*, const std::vector<double>*>>& pairs,
                  Shares& shares) {
  std::string text;
  for (const auto& [expected, got] : pairs) {
    double share = 0;
    const std::string wrong = compare(*expected, *got, &share);
    if (!wrong.empty()) text += "\n  " + wrong;
    shares[expected->name] = std::max(shares[expected->name], share);
  }
  return text;
}

void run_problems(const char* kind, const std::vector<Problem>& problems, int patience,
                  bool at_once) {
  if (const char* wanted = std::getenv("NATSLM_GPU_PATIENCE")) patience = std::atoi(wanted);
  std::vector<Combination> wanted;
  for (const Combination& combination : combinations()) {
    if (!given_up().contains(combination.name())) wanted.push_back(combination);
  }
  const auto report = [&](const Combination& combination, const Outcome& outcome) {
    const IsolatedResult& result = outcome.result;
    const std::string name = combination.name();
    std::printf("%-8s %-24s %5zu problems %7.1f s  %s%s%s\n", kind, name.c_str(), problems.size(),
                outcome.seconds, result.failures.empty() ? "ok" : "FAILED",
                result.notes.empty() ? "" : ", error / allowed:",
                result.notes.empty() ? "" : result.notes[0].c_str());
    std::fflush(stdout);
    if (result.failures.empty()) return;
    given_up().insert(name);
    for (const std::string& failure : result.failures) {
      ADD_FAILURE() << kind << ", " << name << ": " << failure;
    }
  };
  std::vector<std::future<Outcome>> running;
  for (const Combination& combination : wanted) {
    running.push_back(std::async(at_once ? std::launch::async : std::launch::deferred,
                                 [&] { return run_combination(combination, problems, patience); }));
  }
  for (size_t i = 0; i < wanted.size(); ++i) report(wanted[i], running[i].get());
}

void run_cases(const char* kind, const std::vector<CaseWithOptions>& cases) {
  const bool many = cases.size() >= kManyProblems;
  const auto batch_from = [&, size = many ? kBatchOfMany : kBatch](size_t begin) {
    return std::span(cases).subspan(begin, std::min(size, cases.size() - begin));
  };
  PreparedCases next = prepare(batch_from(0));
  for (size_t begin = 0; begin < cases.size();) {
    const PreparedCases prepared = std::move(next);
    begin += prepared.size();
    std::future<PreparedCases> preparing;
    if (begin < cases.size()) {
      preparing =
          std::async(many ? std::launch::async : std::launch::deferred, prepare, batch_from(begin));
    }
    std::vector<Problem> problems;
    for (const auto& p : prepared) {
      problems.push_back(
          {p->describe(), [&p](Memory& memory, const Combination& combination, Shares& shares) {
             return combination.backward ? check_backward(*p, memory, combination, shares)
                                         : check_forward(*p, memory, combination, shares);
           }});
    }
    run_problems(kind, problems, kPatience, many);
    if (preparing.valid()) next = preparing.get();
  }
}

}  // namespace natslm::test
