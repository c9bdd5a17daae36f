// Which tiles of queries a block with a span of keys goes through. Pure functions, the same on the
// device and in tests.
//
// Tiles are counted from the last query that is needed: that one is below the length, so no tile
// reads past it (what lies there may be NaN, and 0 * NaN would spoil a gradient). A tile may begin
// before the first query; those pairs are not causal and are tested anyway.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"

namespace natslm::kernels::sm90 {

// Queries whose scores are in registers at a time where keys are the rows.
inline constexpr int32_t kTileQueries = 64;
// Keys of a warpgroup there.
inline constexpr int32_t kWarpgroupKeys = 64;

// What keys span; of no key: nothing reads them.
struct KeyBounds {
  int32_t first = kMaxPosition, last = -1;  // positions
  int32_t min_last = kMaxPosition, max_last = -1;
  int32_t max_horizon = -1;
};

NATSLM_HD constexpr KeyBounds unite(const KeyBounds& a, const KeyBounds& b) {
  const auto low = [](int32_t x, int32_t y) { return x < y ? x : y; };
  const auto high = [](int32_t x, int32_t y) { return x > y ? x : y; };
  return {low(a.first, b.first), high(a.last, b.last), low(a.min_last, b.min_last),
          high(a.max_last, b.max_last), high(a.max_horizon, b.max_horizon)};
}

// Tiles of kTileQueries queries, the last one first: tile t of `count` begins at `end` -
// kTileQueries * (t + 1), which may be negative.
struct QueryTiles {
  int32_t end = 0, count = 0;
};

// max_last and max_horizon are at most length - 1.
NATSLM_HD constexpr QueryTiles query_tiles(const KeyBounds& keys) {
  const int32_t last = keys.max_last > keys.max_horizon ? keys.max_last : keys.max_horizon;
  if (last < keys.first) return {};
  return {last + 1, (last - keys.first) / kTileQueries + 1};
}

// How a tile of queries from q0 on meets some keys.
NATSLM_HD constexpr Tile visibility_of(const KeyBounds& keys, int32_t q0) {
  return classify(q0, q0 + kTileQueries - 1, keys.first, keys.last, keys.min_last, keys.max_last);
}
NATSLM_HD constexpr bool adds_to_role_sums(const KeyBounds& keys, int32_t q0) {
  return keys.first <= q0 + kTileQueries - 1 && keys.max_horizon >= q0;
}

}  // namespace natslm::kernels::sm90
