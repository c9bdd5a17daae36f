// Which tiles of queries the Hopper kernels with keys as rows go through, against brute force:
// every pair that counts lies in exactly one tile, no tile reaches past the length, and what is
// said of a tile holds for each of its pairs. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/lifetime.h"
#include "natslm/kernels/sm90/attention_backward_tiles.h"

namespace natslm::kernels::sm90 {
namespace {

struct Key {
  int32_t position, last, horizon;  // last and horizon: -1 .. length - 1
};

KeyBounds bounds_of(const std::vector<Key>& keys) {
  KeyBounds of;
  for (const Key& k : keys) {
    of = unite(of, {k.position, k.position, k.last, k.last, k.horizon});
  }
  return of;
}

std::string describe(const std::vector<Key>& keys, int32_t length) {
  std::string text = "length " + std::to_string(length) + ", position:last:horizon";
  for (const Key& k : keys) {
    text += " " + std::to_string(k.position) + ":" + std::to_string(k.last) + ":" +
            std::to_string(k.horizon);
  }
  return text;
}

void check(const std::vector<Key>& keys, int32_t length) {
  SCOPED_TRACE(describe(keys, length));
  const KeyBounds bounds = bounds_of(keys);
  const QueryTiles tiles = query_tiles(bounds);
  ASSERT_GE(tiles.count, 0);
  ASSERT_LE(tiles.end, length);
  std::vector<int> times(length, 0);  // tiles that hold a query
  for (int32_t t = 0; t < tiles.count; ++t) {
    const int32_t q0 = tiles.end - kTileQueries * (t + 1);
    ASSERT_GE(q0, -(kTileQueries - 1));
    const Tile visibility = visibility_of(bounds, q0);
    const bool adds = adds_to_role_sums(bounds, q0);
    for (int32_t i = q0; i < q0 + kTileQueries; ++i) {
      if (i >= 0) ++times[i];
      for (const Key& k : keys) {
        const bool seen = i >= 0 && visible(i, k.position, k.last);
        ASSERT_FALSE(visibility == Tile::kDead && seen) << "query " << i;
        ASSERT_FALSE(visibility == Tile::kFull && !seen) << "query " << i;
        ASSERT_FALSE(!adds && visible(i, k.position, k.horizon)) << "query " << i;
      }
    }
  }
  for (int32_t i = 0; i < length; ++i) {
    ASSERT_LE(times[i], 1) << "query " << i;
    for (const Key& k : keys) {
      if (visible(i, k.position, k.last) || visible(i, k.position, k.horizon)) {
        ASSERT_EQ(times[i], 1) << "query " << i;
      }
    }
  }
}

TEST(QueryTiles, OneKeyAnywhere) {
  for (const int32_t length : {1, 2, 63, 64, 65, 130}) {
    for (int32_t position = 0; position < length; ++position) {
      for (int32_t last = -1; last < length; ++last) {
        check({{position, last, -1}}, length);
        check({{position, -1, last}}, length);
      }
    }
  }
}

TEST(QueryTiles, NoKey) {
  EXPECT_EQ(query_tiles({}).count, 0);
  EXPECT_EQ(visibility_of({}, 0), Tile::kDead);
  EXPECT_FALSE(adds_to_role_sums({}, 0));
}

TEST(QueryTiles, ManyKeys) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    uint32_t draws = 0;
    const auto below = [&](int32_t n) {
      return static_cast<int32_t>(philox({seed, 0}, {draws++, 0, 0, 0})[0] %
                                  static_cast<uint32_t>(n));
    };
    const int32_t length = 1 + below(400);
    std::vector<Key> keys(1 + below(64));
    for (Key& k : keys) {
      k.position = below(length);
      const int32_t reach = below(3) == 0 ? length : 1 + below(40);
      k.last = std::min(k.position - 1 + below(reach + 1), length - 1);
      k.horizon = below(2) == 0 ? -1 : std::min(k.position + below(reach), length - 1);
    }
    check(keys, length);
  }
}

}  // namespace
}  // namespace natslm::kernels::sm90
