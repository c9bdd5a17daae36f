// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/step_plan.h"

#include <gtest/gtest.h>

#include <cmath>

namespace natslm::train {
namespace {

Options options(int64_t batch, int64_t micro, const char* optimize) {
  Options o;
  o.batch = batch;
  o.micro_batch = micro;
  o.context = 10;
  o.optimize = optimize;
  return o;
}

TEST(StepPlan, EverySequenceIsInOnePartAndTheLossIsAMean) {
  for (const char* optimize : {kJoint, kAlternating}) {
    for (const int64_t batch : {2, 4, 8, 12}) {
      for (const int64_t micro : {0, 1, 2, 4, 6, 12}) {
        const Options o = options(batch, micro, optimize);
        if (micro > batch || (micro > 0 && batch % micro != 0)) continue;
        try {
          check(o);
        } catch (const std::exception&) {
          continue;
        }
        int64_t next = 0;
        double weights = 0, scores = 0, price = 0;
        bool weights_begun = false, scores_begun = false;
        for (const Part& part : parts_of(o)) {
          EXPECT_EQ(part.first, next);
          next += part.count;
          EXPECT_LE(part.count, micro > 0 ? micro : batch);
          const double loss = part.loss_weight * static_cast<double>(part.count * o.context);
          if (part.weights) weights += loss;
          if (part.scores) scores += loss, price += part.price_share;
          EXPECT_EQ(part.accumulate, part.weights ? weights_begun : scores_begun);
          weights_begun |= part.weights;
          scores_begun |= part.scores;
        }
        EXPECT_EQ(next, batch);
        EXPECT_NEAR(weights, 1, 1e-12);
        EXPECT_NEAR(scores, 1, 1e-12);
        EXPECT_NEAR(price, 1, 1e-12);
      }
    }
  }
}

TEST(StepPlan, AlternatingSplitsTheBatchInHalves) {
  const auto parts = parts_of(options(8, 0, kAlternating));
  ASSERT_EQ(parts.size(), 2u);
  EXPECT_TRUE(parts[0].weights && !parts[0].scores && !parts[0].accumulate);
  EXPECT_TRUE(!parts[1].weights && parts[1].scores && !parts[1].accumulate);
  EXPECT_EQ(parts[1].first, 4);
}

TEST(DrawnBias, IsSpreadEvenlyAndAFunctionOfItsArgumentsAlone) {
  double sum = 0, squares = 0;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    const float bias = drawn_bias(7, i / 32, i, 3);
    EXPECT_EQ(bias, drawn_bias(7, i / 32, i, 3));
    ASSERT_LT(std::abs(bias), 3);
    sum += bias;
    squares += bias * bias;
  }
  EXPECT_NEAR(sum / kDraws, 0, 0.05);
  EXPECT_NEAR(squares / kDraws, 3, 0.05);  // of U(-3, 3)
  EXPECT_NE(drawn_bias(7, 1, 5, 3), drawn_bias(8, 1, 5, 3));
  EXPECT_NE(drawn_bias(7, 1, 5, 3), drawn_bias(7, 2, 5, 3));
  EXPECT_NE(drawn_bias(7, 1, 5, 3), drawn_bias(7, 1, 6, 3));
  EXPECT_EQ(drawn_bias(7, 1, 5, 0), 0);
}

}  // namespace
}  // namespace natslm::train
