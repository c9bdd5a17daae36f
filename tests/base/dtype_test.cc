// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace natslm {
namespace {

uint16_t bits(float value) {
  return BFloat16(value).bits;
}

TEST(BFloat16, SurvivesTheWayToFloatAndBackInAllItsValues) {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    BFloat16 x;
    x.bits = static_cast<uint16_t>(i);
    const float wide = static_cast<float>(x);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(wide))));
    } else {
      EXPECT_EQ(bits(wide), i);
    }
  }
}

TEST(BFloat16, RoundsToNearestAndTiesToEven) {
  EXPECT_EQ(bits(1.0f), 0x3f80);
  EXPECT_EQ(bits(1.0f + 0x1p-8f), 0x3f80) << "half way: down to even";
  EXPECT_EQ(bits(1.0f + 3 * 0x1p-8f), 0x3f82) << "half way: up to even";
  EXPECT_EQ(bits(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81) << "above half way";
  EXPECT_EQ(bits(std::numeric_limits<float>::max()), 0x7f80) << "rounds to infinity";
  EXPECT_EQ(bits(-0.0f), 0x8000);
}

}  // namespace
}  // namespace natslm
