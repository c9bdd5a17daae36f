// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "tests/support/error_of.h"

namespace natslm::roles {
namespace {

using test::error_of;
using testing::HasSubstr;

const Calibration kTable{{-4, -1, 0, 3}, {0.8f, 0.5f, 0.25f, 0.05f}, {}};

TEST(Calibration, GivesTheMeasuredBiasesAtTheMeasuredShares) {
  for (size_t i = 0; i < kTable.bias.size(); ++i) {
    EXPECT_FLOAT_EQ(kTable.bias_for(kTable.kv_end[i]), kTable.bias[i]);
  }
}

TEST(Calibration, IsLinearBetweenThem) {
  EXPECT_NEAR(kTable.bias_for(0.65), -2.5, 1e-6);
  EXPECT_NEAR(kTable.bias_for(0.1), 2.25, 1e-6);
}

TEST(Calibration, StaysAtTheNearestPointBeyondThem) {
  EXPECT_EQ(kTable.bias_for(1), -4);
  EXPECT_EQ(kTable.bias_for(0.01), 3);
  EXPECT_EQ((Calibration{{2}, {0.3f}, {}}).bias_for(0.9), 2);
  EXPECT_EQ((Calibration{{2}, {0.3f}, {}}).bias_for(0.1), 2);
}

TEST(Calibration, NeverKeepsMoreForLess) {
  // Two biases between which nothing changes included.
  const Calibration flat{{-2, 0, 1, 2}, {0.5f, 0.3f, 0.3f, 0.1f}, {}};
  for (const Calibration& table : {kTable, flat}) {
    float before = std::numeric_limits<float>::infinity();
    for (int i = 0; i <= 1000; ++i) {
      const float bias = table.bias_for(i / 1000.0);
      EXPECT_LE(bias, before) << i;
      EXPECT_GE(bias, table.bias.front());
      EXPECT_LE(bias, table.bias.back());
      before = bias;
    }
  }
  EXPECT_NEAR(flat.bias_for(0.3f), 0, 1e-6);  // the one that hides no more than it must
  EXPECT_GE(flat.bias_for(0.2999), 1);
}

TEST(Calibration, ATableThatIsNoneIsRefused) {
  const auto of = [](const Calibration& table) { return error_of([&] { check(table, 2); }); };
  EXPECT_NO_THROW(check(kTable, 2));
  EXPECT_NO_THROW(check({{0}, {1}, {0.5f, 0}}, 2));
  EXPECT_THAT(of({}), HasSubstr("0 biases and 0 shares"));
  EXPECT_THAT(of({{1, 2}, {0.5f}, {}}), HasSubstr("2 biases and 1 shares"));
  EXPECT_THAT(of({{2, 1}, {0.5f, 0.4f}, {}}), HasSubstr("bias 1 at place 1"));
  EXPECT_THAT(of({{1, NAN}, {0.5f, 0.4f}, {}}), HasSubstr("at place 1"));
  EXPECT_THAT(of({{1, 2}, {0.4f, 0.5f}, {}}), HasSubstr("KV at end 0.5 at place 1"));
  EXPECT_THAT(of({{1}, {0}, {}}), HasSubstr("(0, 1]"));
  EXPECT_THAT(of({{1}, {1.5f}, {}}), HasSubstr("(0, 1]"));
  EXPECT_THAT(of({{1}, {0.5f}, {1}}), HasSubstr("1 layer shares do not fit a model of 2"));
  EXPECT_THAT(of({{1}, {0.5f}, {-1, 2}}), HasSubstr("is -1"));
  EXPECT_THAT(of({{1}, {0.5f}, {0, 0}}), HasSubstr("all 0"));
  EXPECT_THAT(error_of([] { Calibration().bias_for(0.5); }), HasSubstr("no table"));
}

}  // namespace
}  // namespace natslm::roles
