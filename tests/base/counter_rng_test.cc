// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/counter_rng.h"

#include <gtest/gtest.h>

namespace natslm {
namespace {

using Words = std::array<uint32_t, 4>;

// The known answers that the authors of Philox publish with it.
TEST(CounterRng, PhiloxGivesItsAuthorsKnownAnswers) {
  EXPECT_EQ(philox({0, 0}, {0, 0, 0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~0u, ~0u}, {~0u, ~0u, ~0u, ~0u}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0xa4093822, 0x299f31d0}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(CounterRng, MixingIsSplitMix64) {
  EXPECT_EQ(mix64(0), 0xe220a8397b1dcdafu);
  EXPECT_EQ(mix64(0x9e3779b97f4a7c15u), 0x6e789e6aa1b965f4u);
}

TEST(CounterRng, AUnitFloatIsNeverZeroOrOne) {
  EXPECT_GT(open_unit(0), 0.0f);
  EXPECT_LT(open_unit(~0u), 1.0f);
  EXPECT_LT(open_unit(0x7fffffffu), 0.5f);
  EXPECT_GT(open_unit(0x80000000u), 0.5f);
}

}  // namespace
}  // namespace natslm
