// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/budget_control.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"

namespace natslm::roles {
namespace {

// A model that follows lambda slowly: its share drifts to 1 / (1 + 10 lambda).
struct Follower {
  double share = 0.6;
  double step(double lambda) {
    share += 0.03 * (1 / (1 + 10 * lambda) - share);
    return share;
  }
};

TEST(BudgetControl, BringsAFollowingModelToTheTarget) {
  for (const double target : {0.5, 0.15, 0.05}) {
    for (const double start : {1e-3, 1e-2, 1.0}) {
      BudgetControl control({.target = target, .initial_lambda = start});
      Follower model;
      for (int step = 0; step < 3000; ++step) control.observe(model.step(control.lambda()));
      EXPECT_NEAR(model.share, target, 0.03 * target) << "target " << target << " from " << start;
      EXPECT_NEAR(control.measured(), target, 0.03 * target);
    }
  }
}

TEST(BudgetControl, MovesAtMostByTheGain) {
  BudgetControl control({.target = 0.01, .initial_lambda = 0.1, .gain = 0.05});
  control.observe(1.0);  // 99 targets too many
  EXPECT_NEAR(std::log(control.lambda() / 0.1), 0.05, 1e-12);
  BudgetControl other({.target = 0.5, .initial_lambda = 0.1, .gain = 0.04});
  other.observe(0.0);
  EXPECT_NEAR(std::log(other.lambda() / 0.1), -0.04, 1e-12);
}

TEST(BudgetControl, GoesOnFromASavedStateAsIfNothingHadHappened) {
  const BudgetOptions options{.target = 0.2};
  BudgetControl whole(options), before(options), after(options);
  for (int step = 0; step < 50; ++step) {
    whole.observe(0.1 + 0.01 * step);
    if (step < 20) before.observe(0.1 + 0.01 * step);
    if (step == 20) after.restore(before.state());
    if (step >= 20) after.observe(0.1 + 0.01 * step);
  }
  EXPECT_EQ(after.lambda(), whole.lambda());
  EXPECT_EQ(after.measured(), whole.measured());
}

TEST(BudgetControl, IsNotWoundUpByATargetOutOfReach) {
  BudgetControl control({.target = 0.1});
  for (int step = 0; step < 100000; ++step) control.observe(0.9);
  EXPECT_LE(control.lambda(), 1e3);
  int steps = 0;
  for (; control.lambda() > 1 && steps < 10000; ++steps) control.observe(0.01);
  EXPECT_LT(steps, 300);
}

TEST(BudgetControl, RefusesImpossibleOptions) {
  EXPECT_THROW(BudgetControl({.target = 0}), Error);
  EXPECT_THROW(BudgetControl({.target = 1.5}), Error);
  EXPECT_THROW(BudgetControl({.target = 0.1, .initial_lambda = 0}), Error);
  EXPECT_THROW(BudgetControl({.target = 0.1, .gain = 0}), Error);
  EXPECT_THROW(BudgetControl({.target = 0.1, .smoothing = 1}), Error);
}

}  // namespace
}  // namespace natslm::roles
