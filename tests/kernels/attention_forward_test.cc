// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_forward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "tests/support/attention_case.h"

namespace natslm::test {
namespace {

using kernels::AttentionForward;

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16};

// What to compare, from one problem.
struct Results {
  explicit Results(AttentionInputs& inputs)
      : truth(run_forward(inputs, kernels::reference::run)),
        plain(run_forward(inputs, plain_forward)),
        again(run_forward(inputs, plain_forward_again)),
        fast(run_forward(inputs, kernels::cpu::run)) {}
  void expect_out_as_good_as_plain(const AttentionCase& c) const {
    EXPECT_EQ(compare("out", fast.out.values(), plain.out.values(), again.out.values(),
                      truth.out.values(), c.dtype, c),
              "");
  }
  ForwardResult truth, plain, again, fast;
};

void expect_as_good_as_plain(const AttentionCase& c) {
  AttentionInputs inputs(c);
  const Results r(inputs);
  r.expect_out_as_good_as_plain(c);
  EXPECT_EQ(compare("lse", widen(r.fast.lse), widen(r.plain.lse), widen(r.again.lse),
                    widen(r.truth.lse), DType::kFloat32, c),
            "");
  EXPECT_EQ(compare("mass", widen(r.fast.mass), widen(r.plain.mass), widen(r.again.mass),
                    widen(r.truth.mass), DType::kFloat32, c),
            "");
  EXPECT_TRUE(r.fast.out.guards_are_intact()) << c.describe();
}

TEST(AttentionForward, IsAtMostTwiceAsWrongAsThePlainOneInEveryCorner) {
  for (const DType dtype : kTypes) {
    for (const AttentionCase& c : corner_cases(dtype)) expect_as_good_as_plain(c);
  }
}

TEST(AttentionForward, IsAtMostTwiceAsWrongAsThePlainOneOnRandomProblems) {
  for (const DType dtype : kTypes) {
    for (uint64_t seed = 1; seed <= 150; ++seed) {
      expect_as_good_as_plain(random_case(seed, dtype));
      if (HasFailure()) return;
    }
  }
}

// The same bits, NaN included.
bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

TEST(AttentionForward, GivesTheSameBitsAgainAndWithAnyNumberOfWorkers) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const AttentionCase c = random_case(seed, DType::kFloat32);
    AttentionInputs inputs(c);
    const ForwardResult once = run_forward(inputs, kernels::cpu::run);
    for (const int workers : {1, 3}) {
      const ForwardResult again = run_forward(inputs, kernels::cpu::run, plain_threads(workers));
      EXPECT_TRUE(identical(once.out.values(), again.out.values())) << c.describe();
      EXPECT_TRUE(identical(widen(once.lse), widen(again.lse))) << c.describe();
      EXPECT_TRUE(identical(widen(once.mass), widen(again.mass))) << c.describe();
    }
  }
}

TEST(AttentionForward, AWindowAsLongAsTheTextChangesNothing) {
  AttentionCase c = random_case(7, DType::kFloat32);
  c.tokens = 200;
  c.window = 200;
  c.lifetimes = Lifetimes::kForever;
  AttentionInputs dense(c);
  c.lifetimes = Lifetimes::kSliding;
  AttentionInputs windowed(c);
  EXPECT_TRUE(identical(run_forward(dense, kernels::cpu::run).out.values(),
                        run_forward(windowed, kernels::cpu::run).out.values()));
}

// Dead keys are never part of a sum: what they hold does not matter.
TEST(AttentionForward, ValuesOfHiddenKeysDoNotReachTheResult) {
  AttentionCase c = random_case(3, DType::kFloat32);
  c.tokens = 200;
  c.head_dim = 16;
  c.lifetimes = Lifetimes::kSliding;
  c.window = 10;
  c.ragged = false;
  AttentionInputs inputs(c);
  for (int d = 0; d < c.head_dim; ++d) {
    inputs.v.set(0, 0, 50, d, INFINITY);
    inputs.k.set(0, 0, 120, d, NAN);
  }
  Results(inputs).expect_out_as_good_as_plain(c);
}

TEST(AttentionForward, ManyTilesOfLongTextAgreeWithThePlainOne) {
  AttentionCase c;
  c.name = "long";
  c.tokens = 1500;
  c.q_heads = 3;
  c.head_dim = 64;
  c.window = 64;
  c.global_share = 0.11;
  c.local_share = 0.03;
  expect_as_good_as_plain(c);
}

TEST(AttentionForward, SaysWhichShapesItRefuses) {
  AttentionForward p;
  p.batch = p.q_heads = p.kv_heads = p.tokens = 1;
  p.head_dim = 12;
  EXPECT_EQ(kernels::cpu::why_not(p), "head_dim must be a multiple of 8 up to 256");
  EXPECT_EQ(kernels::reference::why_not(p), "");
  EXPECT_THROW(kernels::cpu::run(p), Error);
  p.head_dim = 264;
  EXPECT_NE(kernels::cpu::why_not(p), "");
  p.head_dim = 256;
  EXPECT_EQ(kernels::cpu::why_not(p), "");
  p.q_heads = 3;
  p.kv_heads = 2;
  EXPECT_NE(kernels::cpu::why_not(p), "");
  EXPECT_NE(kernels::reference::why_not(p), "");
}

}  // namespace
}  // namespace natslm::test
