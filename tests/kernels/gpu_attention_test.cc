// The GPU backends of attention against the double-precision reference, forward and backward, in
// position order and over sorted keys. Every backend and pass runs in a process of its own.
//
//   kernels_gpu_test --smoke           the simplest problems first: what to run on new kernels
//   NATSLM_GPU_CASES=10000 kernels_gpu_test     that many random problems (200), from seed
//                                               NATSLM_GPU_FIRST (1)
//   NATSLM_GPU_PATIENCE=600 kernels_gpu_test    seconds after which a problem counts as hung
//   NATSLM_GPU_ONLY="sm90 forward" kernels_gpu_test     only what has this in its name
//
// Above kManyProblems all combinations run at the same time, and the truths of the next problems
// are computed meanwhile: 10,000 random problems are some 45 core-minutes.
//
// Without a GPU only the CPU kernels go through all this, which tests the test.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <sstream>
#include <thread>

#include "natslm/base/error.h"
#include "natslm/base/parallel.h"
#include "tests/support/device_attention.h"
#include "tests/support/isolated.h"
#include "tests/support/sampled_attention.h"

namespace natslm::test {
namespace {

constexpr int kPatience = 30;  // seconds that a problem may take on the device: longer is a hang
constexpr int kLongPatience = 150;  // with rows in double precision
constexpr int kStopAfter = 3;       // failing problems of a combination
constexpr size_t kBatch = 256;      // problems prepared at a time: some 14 MB each
constexpr size_t kManyProblems = 2000;
constexpr size_t kBatchOfMany = 512;  // starting the device costs each combination a second a batch
constexpr int kShortTokens = 2048;    // of what the short path says it takes

// ------------------------------------------------------------------ what is tested

bool is_short(const AttentionBackend& backend) {
  return &backend == &kSm90ShortBackend || &backend == &kSm90ShortAllBackend;
}

struct Combination {
  const AttentionBackend* backend;
  bool backward, sorted;
  std::string name() const {
    return std::string(backend->name) + (backward ? " backward " : " forward ") +
           (sorted ? "sorted" : "position");
  }
};

// "" or why no GPU can be used, found out by a child: the parent must not start CUDA.
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

template <class Params>
Params one_token() {
  Params p;
  p.batch = p.q_heads = p.kv_heads = p.tokens = 1;
  p.head_dim = 64;
  p.dtype = DType::kBFloat16;
  p.q_stride = p.k_stride = p.v_stride = p.out_stride = {64, 64, 64};
  return p;
}

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
    for (const AttentionBackend* backend : {&kCudaBackend, &kSm90Backend, &kSm90ShortBackend,
                                            &kSm90ShortAllBackend, &kSm90WholeBackend}) {
      for (const bool backward : {false, true}) {
        for (const bool sorted : {false, true}) {
          if (sorted && is_short(*backend)) continue;                  // they know no order
          if (backward && backend == &kSm90ShortAllBackend) continue;  // forward only
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

// Heads of 256 channels are the portable kernels' alone (natslm/kernels/gpu_head_dim.h).
bool is_made_for(const Combination& combination, int head_dim) {
  return head_dim <= 128 || combination.backend == &kCudaBackend || !combination.backend->on_gpu;
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

using Shares = std::map<std::string, double>;  // largest error / allowed error of each output

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

using Check = std::function<std::string(Memory&, const Combination&, Shares&)>;
struct Problem {
  std::string description;
  Check check;  // "" or what is wrong
};

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

// One line a combination; failures are reported to GoogleTest.
void run_problems(const char* kind, const std::vector<Problem>& problems, int patience,
                  bool at_once = false) {
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

int threads() {
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

struct CaseWithOptions {
  AttentionCase problem;
  BackwardOptions options;
};

using PreparedCases = std::vector<std::unique_ptr<Prepared>>;

PreparedCases prepare(std::span<const CaseWithOptions> cases) {
  PreparedCases prepared(cases.size());
  plain_threads(threads())(std::ssize(cases), [&](int64_t i, int) {
    prepared[i] = std::make_unique<Prepared>(cases[i].problem, cases[i].options);
  });
  return prepared;
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

// ------------------------------------------------------------------ the problems

AttentionCase simple(const char* name, Lifetimes lifetimes, int tokens, int head_dim) {
  AttentionCase c;
  c.name = name;
  c.dtype = DType::kBFloat16;
  c.lifetimes = lifetimes;
  c.tokens = tokens;
  c.head_dim = head_dim;
  c.window = 16;
  return c;
}

// From what any kernel gets right first to all features together.
std::vector<CaseWithOptions> smoke_cases() {
  std::vector<CaseWithOptions> cases;
  const auto add = [&](AttentionCase c, BackwardOptions options = {}) {
    c.seed = cases.size() + 1;
    cases.push_back({c, options});
  };
  const BackwardOptions no_sums{.horizon_count = 0};
  for (const int head_dim : {64, 128, 256}) {
    add(simple("dense, one tile", Lifetimes::kForever, 64, head_dim), no_sums);
    add(simple("dense, one tile, role sums", Lifetimes::kForever, 64, head_dim));
    add(simple("dense, two tiles", Lifetimes::kForever, 128, head_dim));
    add(simple("dense, four tiles", Lifetimes::kForever, 256, head_dim));
    add(simple("dense, no whole tiles", Lifetimes::kForever, 300, head_dim));
    add(simple("one key", Lifetimes::kForever, 1, head_dim));
    add(simple("window", Lifetimes::kSliding, 256, head_dim));
    add(simple("roles", Lifetimes::kRoles, 300, head_dim));
    add(simple("any lifetimes", Lifetimes::kAnything, 300, head_dim));
    add(simple("nobody sees anything", Lifetimes::kNever, 130, head_dim));
    AttentionCase c = simple("two heads", Lifetimes::kRoles, 200, head_dim);
    c.q_heads = c.kv_heads = 2;
    add(c);
    c.name = "group of two";
    c.kv_heads = 1;
    add(c);
    c.name = "group of four";
    c.q_heads = 4;
    add(c);
    c.name = "group of three";
    c.q_heads = 3;
    add(c);
    c.name = "two sequences";
    c.batch = 2;
    add(c);
    c.name = "lengths";
    c.batch = 3;
    c.ragged = true;
    add(c);
    c.name = "token-major memory";
    c.token_major = true;
    add(c);
  }
  return cases;
}

// Its place is its seed, which decides how many horizons it has.
void add_numbered(std::vector<CaseWithOptions>& cases, AttentionCase c) {
  c.seed = cases.size() + 1;
  BackwardOptions options;
  options.horizon_count = static_cast<int>(c.seed % 5);
  cases.push_back({c, options});
}

std::vector<CaseWithOptions> corners() {
  std::vector<CaseWithOptions> cases;
  const auto add = [&](const AttentionCase& c) { add_numbered(cases, c); };
  for (const int head_dim : {64, 128, 256}) {
    for (AttentionCase c : corner_cases(DType::kBFloat16)) {
      c.head_dim = head_dim;
      c.q_heads = head_dim == 64 ? 1 : 4;
      add(c);
      c.token_major = true;
      c.q_heads = head_dim == 64 ? 2 : 6;
      c.kv_heads = 2;
      add(c);
    }
    for (int group = 1; group <= 8; ++group) {
      AttentionCase c = simple("every group", Lifetimes::kRoles, 170, head_dim);
      c.q_heads = group;
      add(c);
    }
    for (const int edge : {32, 64, 96, 128, 192, 256}) {
      for (int tokens = edge - 1; tokens <= edge + 1; ++tokens) {
        add(simple("around the edge of a tile", Lifetimes::kRoles, tokens, head_dim));
      }
    }
    for (const int window : {0, 1, 31, 63, 64, 65, 127, 128, 200}) {
      AttentionCase c = simple("every window", Lifetimes::kRoles, 290, head_dim);
      c.window = window;
      c.global_share = 0.1;
      add(c);
    }
    for (const double global : {0.0, 0.01, 0.5, 1.0}) {
      for (const double local : {0.0, 1.0 - global}) {
        AttentionCase c = simple("every mix of roles", Lifetimes::kRoles, 280, head_dim);
        c.global_share = global;
        c.local_share = local;
        add(c);
      }
    }
  }
  return cases;
}

CaseWithOptions random_problem(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  AttentionCase c;
  c.name = "random";
  c.seed = seed;
  c.dtype = DType::kBFloat16;
  c.head_dim = pick(0, 1) ? 64 : 128;
  c.batch = pick(1, 3);
  c.kv_heads = pick(1, 3);
  c.q_heads = c.kv_heads * pick(1, 8);
  // Some pairs cost the reference a microsecond each.
  const int64_t budget = pick(0, 15) == 0 ? 3'000'000 : 400'000;
  int most = 900;
  while (most > 8 && int64_t{most} * most / 2 * c.batch * c.q_heads * c.head_dim / 64 > budget) {
    most -= 4;
  }
  c.tokens = pick(1, most);
  const int kind = pick(0, 19);
  constexpr Lifetimes kRest[] = {Lifetimes::kForever,  Lifetimes::kLocal, Lifetimes::kSliding,
                                 Lifetimes::kOnlySelf, Lifetimes::kNever, Lifetimes::kAllDieAtOnce};
  c.lifetimes = kind < 11 ? Lifetimes::kRoles : kind < 14 ? Lifetimes::kAnything : kRest[kind - 14];
  c.window = pick(0, 2) ? pick(0, 40) : pick(0, 300);
  c.global_share = pick(0, 3) * 0.12;
  c.local_share = pick(0, 3) * 0.12;
  c.ragged = pick(0, 1) == 1;
  c.token_major = pick(0, 1) == 1;
  c.size = pick(0, 4) == 0 ? 8.0 : 1.0;
  BackwardOptions options;
  options.horizon_count = pick(0, kernels::kMaxHorizons);
  options.causal_role_normaliser = pick(0, 4) == 0;
  options.limit_factor = pick(0, 2) != 0;
  // A single pair of e^30 would decide alone who is luckier with the last bit of its score.
  if (!options.limit_factor) c.size = 1;
  if (seed % 8 == 0) c.head_dim = 256;
  return {c, options};
}

// Around what the kernels for short texts list, cut and pad.
std::vector<CaseWithOptions> short_texts() {
  std::vector<CaseWithOptions> cases;
  const auto add = [&](const AttentionCase& c) { add_numbered(cases, c); };
  for (const int head_dim : {64, 128}) {
    for (int tokens = 1; tokens <= 130; ++tokens) {
      constexpr Lifetimes kKinds[] = {Lifetimes::kRoles, Lifetimes::kAllDieAtOnce,
                                      Lifetimes::kForever, Lifetimes::kSliding,
                                      Lifetimes::kAnything};
      AttentionCase c = simple("every short length", kKinds[tokens % 5], tokens, head_dim);
      c.global_share = tokens % 3 * 0.1;
      add(c);
    }
    for (int group = 1; group <= 8; ++group) {
      AttentionCase c = simple("every group, lengths", Lifetimes::kRoles, 200, head_dim);
      c.q_heads = 2 * group;
      c.kv_heads = 2;
      c.batch = 3;
      c.ragged = true;
      c.token_major = group % 2 == 0;
      add(c);
      c.name = "every group, all die at once";
      c.lifetimes = Lifetimes::kAllDieAtOnce;
      add(c);
    }
  }
  return cases;
}

// ------------------------------------------------------------------ the tests

TEST(GpuAttention, Smoke) {
  run_cases("smoke", smoke_cases());
}

TEST(GpuAttention, IsAtMostTwiceAsWrongAsThePlainOnesInEveryCorner) {
  std::vector<CaseWithOptions> cases = corners();
  if (!no_gpu().empty()) cases.resize(20);
  run_cases("corners", cases);
}

TEST(GpuAttention, IsAtMostTwiceAsWrongAsThePlainOnesOnShortTexts) {
  std::vector<CaseWithOptions> cases = short_texts();
  if (!no_gpu().empty()) cases.resize(20);
  run_cases("short", cases);
}

TEST(GpuAttention, IsAtMostTwiceAsWrongAsThePlainOnesOnRandomProblems) {
  const char* wanted = std::getenv("NATSLM_GPU_CASES");
  const int count = wanted ? std::atoi(wanted) : no_gpu().empty() ? 200 : 8;
  std::vector<CaseWithOptions> cases;
  const char* first = std::getenv("NATSLM_GPU_FIRST");
  const int begin = first ? std::atoi(first) : 1;
  for (int i = 0; i < count; ++i) cases.push_back(random_problem(begin + i));
  run_cases("random", cases);
}

// Rows of long problems: all heads at positions around the edges of tiles and at random.
std::string check_long(const DeviceProblem& problem, Memory& memory, const Combination& combination,
                       Shares& shares) {
  const AttentionCase& c = problem.inputs.problem;
  if (!is_made_for(combination, c.head_dim)) return "";
  const ParallelFor parallel = plain_threads(threads());
  std::set<int32_t> chosen = {0, 1, 63, 64, 127, 128, c.tokens / 2, c.tokens - 2, c.tokens - 1};
  std::mt19937_64 random(c.seed);
  while (chosen.size() < 28) chosen.insert(static_cast<int32_t>(random() % c.tokens));
  const std::vector<int32_t> positions(chosen.begin(), chosen.end());
  const RunOptions options{.sorted = combination.sorted, .mass = true, .workspace = 0xff};
  if (is_short(*combination.backend) && c.tokens > kShortTokens) {
    const std::string refused =
        combination.backward
            ? run_backward(problem, {}, memory, *combination.backend, options).refused
            : run_forward(problem, memory, *combination.backend, options).refused;
    return refused.empty() ? "takes a text that is not short" : "";
  }

  ForwardOutputs forward = run_forward(problem, memory, *combination.backend, options);
  if (!forward.refused.empty() && combination.backward) {
    forward = run_forward(problem, memory, kCudaBackend, options);
  }
  if (!forward.refused.empty()) return "refused: " + forward.refused;
  const auto at = [&](const std::vector<double>& values, int columns) {
    return pick(values, c.tokens, columns, positions);
  };
  if (!combination.backward) {
    const std::vector<Expected> expected = sampled_forward(problem, positions, parallel);
    const std::vector<double> out = at(forward.out, c.head_dim), lse = at(forward.lse, 1);
    std::string text = judge({{&expected[0], &out}, {&expected[1], &lse}}, shares);
    if (!text.empty()) return text + forward.damage;
    const std::vector<Expected> keys = sampled_backward(problem, forward, positions, parallel);
    const std::vector<double> mass = at(forward.mass, 1);
    return judge({{&keys[0], &mass}}, shares) + forward.damage;
  }
  const BackwardOutputs got = run_backward(problem, forward, memory, *combination.backend, options);
  if (!got.refused.empty()) return "refused: " + got.refused;
  const std::vector<Expected> expected = sampled_backward(problem, forward, positions, parallel);
  const std::vector<double> dq = at(got.dq, c.head_dim), dk = at(got.dk, c.head_dim),
                            dv = at(got.dv, c.head_dim), sums = at(got.role_sums, 1);
  std::string text =
      judge({{&expected[1], &dq}, {&expected[2], &dk}, {&expected[3], &dv}, {&expected[4], &sums}},
            shares);
  const BackwardOutputs again =
      run_backward(problem, forward, memory, *combination.backend, options);
  if (!identical(got.dq, again.dq) || !identical(got.dk, again.dk) ||
      !identical(got.dv, again.dv) || !identical(got.role_sums, again.role_sums)) {
    text += "\n  other bits the second time";
  }
  return text + got.damage;
}

TEST(GpuAttention, SampledRowsOfLongProblemsAreRight) {
  struct Long {
    int tokens, batch, q_heads, kv_heads, head_dim, window;
    bool ragged;
  };
  std::vector<Long> sizes = {{2047, 2, 2, 2, 64, 32, true},     {2048, 1, 12, 4, 64, 32, false},
                             {2048, 2, 8, 2, 128, 32, true},    {2049, 1, 4, 1, 128, 64, false},
                             {4096, 1, 2, 2, 64, 64, false},    {4096, 1, 4, 1, 128, 256, false},
                             {5000, 2, 3, 1, 128, 64, true},    {8192, 1, 8, 2, 64, 256, false},
                             {16384, 1, 4, 1, 128, 256, false}, {16000, 2, 1, 1, 64, 16, true},
                             {3000, 1, 8, 1, 256, 64, true},    {8192, 1, 4, 2, 256, 256, false}};
  if (!no_gpu().empty()) sizes = {{1500, 2, 4, 2, 64, 64, true}};
  std::vector<std::unique_ptr<DeviceProblem>> problems;
  std::vector<Problem> list;
  for (const Long& size : sizes) {
    AttentionCase c = simple("long", Lifetimes::kRoles, size.tokens, size.head_dim);
    c.seed = 1 + problems.size();
    c.batch = size.batch;
    c.q_heads = size.q_heads;
    c.kv_heads = size.kv_heads;
    c.window = size.window;
    c.global_share = 0.11;
    c.local_share = 0.03;
    c.ragged = size.ragged;
    c.token_major = true;
    problems.push_back(std::make_unique<DeviceProblem>(c));
    const DeviceProblem& problem = *problems.back();
    list.push_back(
        {c.describe(), [&problem](Memory& memory, const Combination& combination, Shares& shares) {
           return check_long(problem, memory, combination, shares);
         }});
  }
  run_problems("long", list, kLongPatience);
}

TEST(GpuAttention, SaysWhatItCannotDo) {
  if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  run_problems("refusals",
               {{"shapes outside the contract",
                 [](Memory&, const Combination& combination, Shares&) -> std::string {
                   const auto good = one_token<kernels::AttentionForward>();
                   const auto accepts = [&](kernels::AttentionForward p) {
                     return combination.backend->forward_why_not(p).empty();
                   };
                   std::string text;
                   if (combination.backward) return text;
                   auto p = good;
                   p.head_dim = 80;
                   if (accepts(p)) text += "\n  takes head_dim 80";
                   p = good;
                   p.dtype = DType::kFloat32;
                   if (accepts(p)) text += "\n  takes float32";
                   p = good;
                   p.q_heads = 9;
                   if (accepts(p)) text += "\n  takes a group of 9";
                   p = good;
                   p.tokens = 2;
                   p.k_stride.token = 65;
                   if (accepts(p)) text += "\n  takes rows that are not 16-byte aligned";
                   return text;
                 }}},
               kPatience);
}

// ------------------------------------------------------------------ what the tests stand on

TEST(DeviceCases, EveryVisibleKeyIsInTheOrderOnceAndItsSegmentIsSorted) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const AttentionCase c = random_problem(seed).problem;
    const AttentionInputs in(c);
    for (const int32_t brief : {-1, 0, c.window}) {
      const HostKeyOrder order = order_keys(c, in.last, in.lengths, brief);
      for (int64_t head = 0; head < int64_t{c.batch} * c.kv_heads; ++head) {
        const int length = in.lengths.empty() ? c.tokens : in.lengths[head / c.kv_heads];
        const int32_t* keys = &order.order[head * c.tokens];
        const int32_t* last = &in.last[head * c.tokens];
        const int32_t* ends = &order.ends[head * 3];
        ASSERT_EQ(ends[2], length);
        EXPECT_EQ(std::set<int32_t>(keys, keys + length).size(), length);
        for (int place = 1; place < length; ++place) {
          const bool same_segment = std::count(ends, ends + 3, place) == 0;
          if (!same_segment) continue;
          EXPECT_LT(keys[place - 1], keys[place]);
          EXPECT_TRUE(place >= ends[1] || last[keys[place - 1]] <= last[keys[place]]);
        }
        for (int place = ends[1]; place < length; ++place) {
          EXPECT_LE(int64_t{last[keys[place]]}, int64_t{keys[place]} + order.reach);
        }
      }
    }
  }
}

TEST(DeviceCases, TheComparisonNamesWrongRowsAndColumns) {
  Expected e{"x", DType::kFloat32, 2, 100, 8, std::vector<double>(1600, 1.0), {}};
  e.plain = {e.truth};
  EXPECT_EQ(compare(e, e.truth), "");
  std::vector<double> got = e.truth;
  for (int row = 164; row < 170; ++row) got[row * 8 + 3] = 0;  // head 1, rows 64 to 69
  const std::string text = compare(e, got);
  EXPECT_NE(text.find("6 of 1600 wrong (0 NaN, 6 zero) in 6 rows"), std::string::npos) << text;
  EXPECT_NE(text.find("heads 1 | rows 64-69 | rows % 64: 0-5 | columns 3"), std::string::npos)
      << text;
  got[0] = NAN;
  EXPECT_NE(compare(e, got).find("1 NaN"), std::string::npos);
}

TEST(DeviceCases, AWriteOutsideAnArrayShows) {
  const auto memory = host_memory();
  GuardedArray array(*memory, 10, 0xff);
  EXPECT_TRUE(array.guards_are_intact());
  array.as<uint8_t>()[10] = 1;
  EXPECT_FALSE(array.guards_are_intact());
  array.as<uint8_t>()[10] = array.as<uint8_t>()[11];
  EXPECT_TRUE(array.guards_are_intact());
  array.as<uint8_t>()[-1] = 1;
  EXPECT_FALSE(array.guards_are_intact());
}

TEST(DeviceCases, AWriteBetweenRowsOrIntoAnInputShows) {
  AttentionCase c = simple("token-major", Lifetimes::kRoles, 10, 64);
  c.token_major = true;
  const DeviceProblem problem(c);
  AttentionBackend broken = kCpuBackend;
  const auto damage = [&] {
    const auto memory = host_memory();
    return run_forward(problem, *memory, broken).damage;
  };
  EXPECT_EQ(damage(), "");
  broken.forward = [](const kernels::AttentionForward& p, CUstream_st*) {
    static_cast<BFloat16*>(p.out)[p.head_dim] = BFloat16(0.0f);
  };
  EXPECT_EQ(damage(), " 2 bytes between rows of out were written;");
  broken.forward = [](const kernels::AttentionForward& p, CUstream_st*) {
    const_cast<int32_t*>(p.last)[3] = 7;
  };
  EXPECT_EQ(damage(), " input last was written;");
}

TEST(DeviceCases, AChildThatDiesOrHangsIsNamed) {
  const IsolatedResult died = run_isolated(
      [](Messages& messages) {
        messages.doing("the first");
        messages.note("a note");
        std::_Exit(3);
      },
      10);
  ASSERT_EQ(died.failures.size(), 1u);
  EXPECT_EQ(died.failures[0], "DIED (exit 3) at: the first");
  EXPECT_EQ(died.notes, std::vector<std::string>{"a note"});
  const IsolatedResult hung = run_isolated(
      [](Messages& messages) {
        messages.doing("waiting");
        std::this_thread::sleep_for(std::chrono::hours(1));
      },
      1);
  ASSERT_EQ(hung.failures.size(), 1u);
  EXPECT_EQ(hung.failures[0], "HUNG for 1 s at: waiting");
  const IsolatedResult threw = run_isolated([](Messages&) { fail("no"); }, 10);
  EXPECT_TRUE(threw.ended);
  EXPECT_EQ(threw.failures, std::vector<std::string>{"no\n  last at: starting"});
}

TEST(DeviceCases, AMatrixUnitCutsWhatIsFarBelowTheLargestTerm) {
  std::vector<float> a(16, 0), b(16, 1);
  a[0] = 1;
  a[1] = 0x1p-24f;
  a[2] = 0x1p-25f;
  EXPECT_EQ(matrix_unit_dot(a.data(), b.data(), 16), 1.0f);  // 1 + 2^-24, cut to a float
  a[3] = 0x1p-23f;
  EXPECT_EQ(matrix_unit_dot(a.data(), b.data(), 16), 1.0f + 0x1p-23f);
  a[0] = -1;
  EXPECT_EQ(matrix_unit_dot(a.data(), b.data(), 16), -(1.0f - 3 * 0x1p-24f));
}

}  // namespace
}  // namespace natslm::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--smoke") GTEST_FLAG_SET(filter, "GpuAttention.Smoke");
  }
  return RUN_ALL_TESTS();
}
