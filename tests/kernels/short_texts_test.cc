// What the Hopper kernels for short texts list of the keys, and where they put them (no GPU
// needed).
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/short_texts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

namespace natslm::kernels::sm90 {
namespace {

TEST(ListedKeys, KeepPositionAndLast) {
  for (int32_t position = 0; position < kShortTokens; position += 89) {
    for (const int32_t last : {0, 1, position, position + 32, kShortTokens, 0xfffe, 0xffff, 0x10000,
                               kMaxPosition, kOpenEnded, kForever}) {
      const ListedKey key = listed_key(position, last);
      EXPECT_NE(key, kNoListedKey);
      EXPECT_EQ(position_of(key), position);
      EXPECT_EQ(last_of(key), std::min(last, kListedForever));
    }
  }
}

TEST(ListedKeys, OfKeysThatNobodyReadsAreNone) {
  EXPECT_EQ(listed_key_or_none(7, -1), kNoListedKey);
  EXPECT_EQ(listed_key_or_none(7, 7), listed_key(7, 7));
}

TEST(ListedKeys, BehindAQueryCompareAsOneNumber) {
  const int32_t end = kShortTokens - 1;
  for (int32_t query = 0; query <= end; query += 31) {
    for (const int32_t position : {0, query / 2, query}) {
      for (const int32_t last : {0, query - 1, query, query + 1, end, kOpenEnded, kForever}) {
        if (last < 0) continue;
        EXPECT_EQ(listed_key(position, last) >= least_key_for(query), last >= query);
      }
    }
    if (query > 0) {
      EXPECT_LT(kNoListedKey, least_key_for(query));
    }
  }
}

TEST(QuerySpans, EndWithTheLastKeyThatIsRead) {
  EXPECT_EQ(keys_up_to({0, -1}), 0);
  EXPECT_EQ(keys_up_to({8, 5}), 0);
  EXPECT_EQ(keys_up_to({0, 0}), 1);
  EXPECT_EQ(keys_up_to({64, 127}), 128);
}

TEST(BatchOfHead, IsADivision) {
  for (const int32_t kv_heads : {1, 2, 3, 5, 7, 8, 12, 32, 96, 128, 1000, 4095}) {
    const uint32_t factor = batch_factor_of(kv_heads);
    const int64_t end = kMostHeadProducts / kv_heads;
    for (int64_t head = 0; head < end; head = head < 5000 ? head + 1 : head + 1 + head / 3) {
      ASSERT_EQ(batch_of(static_cast<uint32_t>(head), factor), head / kv_heads) << head;
    }
    for (int64_t head = end - 2 * kv_heads; head < end; ++head) {
      ASSERT_EQ(batch_of(static_cast<uint32_t>(std::max<int64_t>(head, 0)), factor),
                std::max<int64_t>(head, 0) / kv_heads);
    }
  }
}

TEST(ListedKeys, AreReadLikeTheKeysThemselves) {
  for (int32_t q0 = 0; q0 < 8; ++q0) {
    for (int32_t q1 = q0 - 1; q1 < 8; ++q1) {
      for (int32_t j = 0; j < 10; ++j) {
        for (const int32_t last : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, kOpenEnded, kForever}) {
          const QuerySpan span{q0, q1};
          int seen = 0;
          for (int32_t i = q0; i <= q1; ++i) seen += visible(i, j, last);
          const Tile reading = reading_of(span, listed_key(j, last));
          if (seen == 0) {
            // A life that ends before its key begins is not known to be dead; every pair is tested.
            EXPECT_TRUE(reading == Tile::kDead || (reading == Tile::kPartial && last < j));
          } else {
            EXPECT_EQ(reading, seen == q1 - q0 + 1 ? Tile::kFull : Tile::kPartial);
            EXPECT_TRUE(is_listed(span, last) && j <= q1);
          }
        }
        EXPECT_EQ(reading_of({q0, q1}, kNoListedKey), Tile::kDead);
      }
    }
  }
}

TEST(ListedKeys, AreSoughtOnceByTheWarpsTogether) {
  for (const int32_t warps : {4, 8}) {
    for (int32_t keys = 0; keys <= kShortTokens; ++keys) {
      const int32_t rounds = list_rounds(keys, warps);
      ASSERT_LE(rounds, list_rounds(kShortTokens, warps));
      ASSERT_GE(rounds * 32 * warps, keys);
      ASSERT_LT((rounds - 1) * 32 * warps, std::max(keys, 1));
    }
  }
}

TEST(QuerySpans, OfTheRowsOfAWarpgroupAreThoseOfItsRows) {
  for (int32_t group = 1; group <= 8; ++group) {
    for (const int32_t rows : {64, 128}) {
      const int32_t tile_queries = rows / group;
      for (int32_t below = 0; below <= tile_queries; ++below) {
        const QuerySpan all{40, 40 + below - 1};
        for (int32_t first = 0; first < rows; first += 64) {
          std::set<int32_t> expected;
          for (int32_t row = first; row < first + 64; ++row) {
            const int32_t offset = row / group;
            if (offset < tile_queries && offset < below) expected.insert(40 + offset);
          }
          const QuerySpan mine = queries_of_rows(all, group, first, 64);
          ASSERT_EQ(mine.q1 >= mine.q0, !expected.empty());
          if (expected.empty()) continue;
          ASSERT_EQ(mine.q0, *expected.begin());
          ASSERT_EQ(mine.q1, *expected.rbegin());
        }
      }
    }
  }
}

TEST(Chunks, FillATileOnceAndNoBankTwiceInARowOfEight) {
  for (const int32_t chunks : {8, 16}) {
    std::set<int32_t> offsets;
    for (int32_t row = 0; row < kListTile; ++row) {
      for (int32_t chunk = 0; chunk < chunks; ++chunk) {
        const int32_t offset = chunk_offset(row, chunk);
        EXPECT_EQ(offset % 16, 0);
        EXPECT_TRUE(offset >= 0 && offset < kListTile * chunks * 16);
        EXPECT_TRUE(offsets.insert(offset).second);
        // Rows a multiple of 8 apart are swizzled alike.
        EXPECT_EQ(chunk_offset(row % 8, chunk) + row / 8 * 8 * 128, offset);
      }
    }
    // What a multiplication reads at a time: one chunk of eight rows.
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      std::set<int32_t> banks;
      for (int32_t row = 0; row < 8; ++row) banks.insert(chunk_offset(row, chunk) % 128);
      EXPECT_EQ(banks.size(), 8u);
    }
  }
}

}  // namespace
}  // namespace natslm::kernels::sm90
