// The GPU backends of attention against the double-precision reference, forward and backward, in
// position order and over sorted keys. Every backend and pass runs in a process of its own.
//
//   kernels_gpu_test --smoke           the simplest problems first: what to run on new kernels
//   NATSLM_GPU_CASES=10000 kernels_gpu_test     that many random problems (200), from seed
//                                               NATSLM_GPU_FIRST (1)
//   NATSLM_GPU_PATIENCE=600 kernels_gpu_test    seconds after which a problem counts as hung
//   NATSLM_GPU_ONLY="sm90 forward" kernels_gpu_test     only what has this in its name
//
// From 2,000 problems on all combinations run at the same time, and the truths of the next problems
// are computed meanwhile: 10,000 random problems are some 45 core-minutes.
//
// Without a GPU only the CPU kernels go through all this, which tests the test.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "natslm/base/parallel.h"
#include "tests/kernels/gpu_attention_cases.h"
#include "tests/kernels/gpu_attention_runs.h"
#include "tests/support/device_attention.h"
#include "tests/support/sampled_attention.h"

namespace natslm::test {
namespace {

constexpr int kShortTokens = 2048;  // of what the short path says it takes

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
    AttentionCase c = simple_case("long", Lifetimes::kRoles, size.tokens, size.head_dim);
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

}  // namespace
}  // namespace natslm::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--smoke") GTEST_FLAG_SET(filter, "GpuAttention.Smoke");
  }
  return RUN_ALL_TESTS();
}
