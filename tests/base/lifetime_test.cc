// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/lifetime.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace natslm {
namespace {

TEST(Lifetime, AKeyIsReadableFromItsOwnStepThroughItsLast) {
  EXPECT_FALSE(visible(4, 5, 7));
  EXPECT_TRUE(visible(5, 5, 7));
  EXPECT_TRUE(visible(7, 5, 7));
  EXPECT_FALSE(visible(8, 5, 7));
  EXPECT_FALSE(visible(5, 5, 4)) << "a key may be born dead";
  EXPECT_TRUE(visible(kMaxPosition, 0, kForever));
  EXPECT_TRUE(visible(kMaxPosition, 0, kOpenEnded));
}

TEST(Lifetime, ADeadKeyIsOneThatNoLaterQueryReads) {
  for (int now = 0; now < 8; ++now) {
    for (int last = -1; last < 8; ++last) {
      bool read = false;
      for (int i = now; i < 10; ++i) read |= visible(i, 0, last);
      EXPECT_EQ(dead(now, last), !read) << "now " << now << ", last " << last;
    }
  }
}

// Every rectangle of a small text: what classify() says of the span of lifetimes must hold for any
// two lifetimes inside it.
TEST(Lifetime, ATileIsDeadOrFullOnlyIfEveryPairIs) {
  constexpr int kText = 6;
  for (int q0 = 0; q0 < kText; ++q0) {
    for (int q1 = q0; q1 < kText; ++q1) {
      for (int k0 = 0; k0 < kText; ++k0) {
        for (int k1 = k0; k1 < kText; ++k1) {
          for (int low = -1; low <= kText; ++low) {
            for (int high = low; high <= kText; ++high) {
              bool any = false, all = true;
              for (int i = q0; i <= q1; ++i) {
                for (int j = k0; j <= k1; ++j) {
                  for (int last = low; last <= high; ++last) {
                    any |= visible(i, j, last);
                    all &= visible(i, j, last);
                  }
                }
              }
              const Tile tile = classify(q0, q1, k0, k1, low, high);
              ASSERT_FALSE(tile == Tile::kDead && any);
              ASSERT_FALSE(tile == Tile::kFull && !all);
              // And it misses no full tile.
              ASSERT_FALSE(tile != Tile::kFull && all);
            }
          }
        }
      }
    }
  }
}

TEST(Lifetime, QueriesServedCountsTheVisibleOnes) {
  for (int tokens = 0; tokens <= 6; ++tokens) {
    for (int j = 0; j < tokens; ++j) {
      for (int last : {-5, 0, 1, 2, 3, 4, 5, 6, 7, kOpenEnded, kForever}) {
        int64_t count = 0;
        for (int i = 0; i < tokens; ++i) count += visible(i, j, last);
        EXPECT_EQ(queries_served(j, last, tokens), count)
            << "key " << j << ", last " << last << ", tokens " << tokens;
      }
    }
  }
}

}  // namespace
}  // namespace natslm
