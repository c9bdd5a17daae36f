// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_backward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/support/attention_case.h"

namespace natslm::test {
namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16};

void expect_as_good_as_plain(const AttentionCase& c, const BackwardOptions& options = {}) {
  AttentionInputs inputs(c);
  ForwardResult forward = run_forward(inputs, kernels::reference::run);
  const BackwardResult truth = run_backward(inputs, forward, kernels::reference::run, options);
  const BackwardResult plain = run_backward(inputs, forward, plain_backward, options);
  const BackwardResult again = run_backward(inputs, forward, plain_backward_again, options);
  const BackwardResult fast = run_backward(inputs, forward, kernels::cpu::run, options);
  EXPECT_EQ(compare("dq", fast.dq.values(), plain.dq.values(), again.dq.values(), truth.dq.values(),
                    c.dtype, c),
            "");
  EXPECT_EQ(compare("dk", fast.dk.values(), plain.dk.values(), again.dk.values(), truth.dk.values(),
                    c.dtype, c),
            "");
  EXPECT_EQ(compare("dv", fast.dv.values(), plain.dv.values(), again.dv.values(), truth.dv.values(),
                    c.dtype, c),
            "");
  EXPECT_EQ(compare("role_sums", widen(fast.role_sums), widen(plain.role_sums),
                    widen(again.role_sums), widen(truth.role_sums), DType::kFloat32, c),
            "");
  EXPECT_TRUE(fast.dq.guards_are_intact() && fast.dk.guards_are_intact() &&
              fast.dv.guards_are_intact())
      << c.describe();
}

TEST(AttentionBackward, IsAtMostTwiceAsWrongAsThePlainOneInEveryCorner) {
  for (const DType dtype : kTypes) {
    for (const AttentionCase& c : corner_cases(dtype)) expect_as_good_as_plain(c);
  }
}

TEST(AttentionBackward, IsAtMostTwiceAsWrongAsThePlainOneOnRandomProblems) {
  for (const DType dtype : kTypes) {
    for (uint64_t seed = 1; seed <= 100; ++seed) {
      BackwardOptions options;
      options.horizon_count = static_cast<int>(seed % 4);
      options.causal_role_normaliser = seed % 5 == 0;
      options.limit_factor = seed % 3 != 0;
      AttentionCase c = random_case(seed, dtype);
      // A single pair of e^30 would decide alone who is luckier with the last bit of its score.
      if (!options.limit_factor) c.size = 1;
      expect_as_good_as_plain(c, options);
      if (HasFailure()) return;
    }
  }
}

bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

TEST(AttentionBackward, GivesTheSameBitsAgainAndWithAnyNumberOfWorkers) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const AttentionCase c = random_case(seed, DType::kFloat32);
    AttentionInputs inputs(c);
    ForwardResult forward = run_forward(inputs, kernels::cpu::run);
    const BackwardResult once = run_backward(inputs, forward, kernels::cpu::run);
    for (const int workers : {1, 3}) {
      const BackwardResult again =
          run_backward(inputs, forward, kernels::cpu::run, {}, plain_threads(workers));
      EXPECT_TRUE(identical(once.dq.values(), again.dq.values())) << c.describe();
      EXPECT_TRUE(identical(once.dk.values(), again.dk.values())) << c.describe();
      EXPECT_TRUE(identical(once.dv.values(), again.dv.values())) << c.describe();
      EXPECT_TRUE(identical(widen(once.role_sums), widen(again.role_sums))) << c.describe();
    }
  }
}

// sum(dout * out), the function whose gradient the backward pass gives.
double loss(AttentionInputs& inputs) {
  const std::vector<double> out = run_forward(inputs, kernels::reference::run).out.values();
  const std::vector<double> weight = inputs.dout.values();
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += out[i] * weight[i];
  return sum;
}

TEST(AttentionBackward, ReferenceGivesTheSlopeOfTheForwardPass) {
  AttentionCase c;
  c.tokens = 9;
  c.q_heads = 2;
  c.head_dim = 8;
  c.window = 2;
  AttentionInputs inputs(c);
  ForwardResult forward = run_forward(inputs, kernels::reference::run);
  const BackwardResult gradient = run_backward(inputs, forward, kernels::reference::run);
  const auto expect_slope = [&](Tensor4& input, const Tensor4& slope, int heads, const char* what) {
    constexpr double kStep = 1.0 / 128;  // exact in float; outputs are rounded to float
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < c.tokens; ++t) {
        for (int d = 0; d < c.head_dim; ++d) {
          const double at = input.get(0, h, t, d);
          input.set(0, h, t, d, at + kStep);
          const double up = loss(inputs), upper = input.get(0, h, t, d);
          input.set(0, h, t, d, at - kStep);
          const double down = loss(inputs), lower = input.get(0, h, t, d);
          input.set(0, h, t, d, at);
          EXPECT_NEAR(slope.get(0, h, t, d), (up - down) / (upper - lower), 5e-4)
              << what << " head " << h << " token " << t << " channel " << d;
        }
      }
    }
  };
  expect_slope(inputs.q, gradient.dq, 2, "dq");
  expect_slope(inputs.k, gradient.dk, 1, "dk");
  expect_slope(inputs.v, gradient.dv, 1, "dv");
}

}  // namespace
}  // namespace natslm::test
