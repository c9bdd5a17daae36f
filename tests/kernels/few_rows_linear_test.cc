// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/few_rows_linear.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cmath>
#include <vector>

#include "natslm/base/counter_rng.h"

namespace natslm::kernels {
namespace {

struct Problem {
  Problem(int64_t rows, int64_t in, int64_t out, bool with_bias)
      : x(numbers(rows * in, 1)), bias(numbers(out, 2)), result(rows * out, NAN) {
    for (const float value : numbers(in * out, 3)) weight.emplace_back(value);
    p.rows = rows;
    p.in = in;
    p.out_size = out;
    p.x = x.data();
    p.weight = weight.data();
    p.bias = with_bias ? bias.data() : nullptr;
    p.out = result.data();
  }
  static std::vector<float> numbers(int64_t count, uint64_t seed) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(mix64(seed * 1000003 + static_cast<uint64_t>(i)) >> 40) /
                           (1 << 23) -
                       1.0f);
    }
    return values;
  }
  std::vector<float> x, bias, result;
  std::vector<BFloat16> weight;
  FewRowsLinear p;
};

TEST(FewRowsLinear, IsTheProductToTheRoundingOfItsSumOnEveryInstructionSet) {
  for (const int64_t target : {int64_t{0}, int64_t{HWY_SSSE3}, int64_t{HWY_AVX2}}) {
    if (target != 0 && (hwy::SupportedTargets() & target) == 0) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    for (const int64_t rows : {1, 2, 3, 4, 8, 13}) {
      for (const int64_t in : {1, 5, 8, 31, 576}) {
        for (const int64_t out : {1, 3, 4, 66, 130}) {
          Problem fast(rows, in, out, rows % 2 == 0), truth(rows, in, out, rows % 2 == 0);
          cpu::run(fast.p);
          reference::run(truth.p);
          for (size_t i = 0; i < fast.result.size(); ++i) {
            // A sum of `in` products of numbers below 1, one after the other in each lane.
            ASSERT_NEAR(fast.result[i], truth.result[i], 6e-8 * (in + 8) * std::sqrt(double(in)))
                << rows << " x " << in << " -> " << out << ", element " << i;
          }
        }
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(FewRowsLinear, GivesARowTheSameBitsWhateverItsNeighboursAndThreads) {
  Problem all(7, 100, 200, true);
  all.p.parallel = plain_threads(3);
  cpu::run(all.p);
  for (int64_t r = 0; r < 7; ++r) {
    Problem one(7, 100, 200, true);
    one.p.rows = 1;
    one.p.x += r * 100;
    cpu::run(one.p);
    for (int64_t o = 0; o < 200; ++o) EXPECT_EQ(one.result[o], all.result[r * 200 + o]);
  }
}

}  // namespace
}  // namespace natslm::kernels
