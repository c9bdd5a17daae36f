// The one rule the whole program stands on: a key has a lifetime.
//
// `last` of a key is the last query position that may read it. Masks, tiles to skip, eviction,
// memory accounting and every rival that drops keys are derived from the functions below.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define NATSLM_HD __host__ __device__
#else
#define NATSLM_HD
#endif

namespace natslm {

// Readable for ever.
inline constexpr int32_t kForever = std::numeric_limits<int32_t>::max();
// Readable for ever as far as is known: an event still to come (the next Global) will end it. Only
// a cache that is being filled holds this value; for visibility it is as good as kForever.
inline constexpr int32_t kOpenEnded = kForever - 1;
// The largest position a token can have.
inline constexpr int32_t kMaxPosition = kForever - 2;

// Query i may read key j from the step that writes j up to and including `last`.
NATSLM_HD constexpr bool visible(int32_t i, int32_t j, int32_t last) {
  return j <= i && i <= last;
}

// A key that no query from position `now` on can read; a cache frees it.
NATSLM_HD constexpr bool dead(int32_t now, int32_t last) {
  return last < now;
}

// What a rectangle of queries and keys asks of a kernel.
enum class Tile : uint8_t {
  kDead,     // no pair is visible: skip it
  kPartial,  // some may be: test each pair
  kFull,     // all are: no test
};

// Queries [q0, q1] against keys [k0, k1] whose lifetimes span [min_last, max_last].
NATSLM_HD constexpr Tile classify(int32_t q0, int32_t q1, int32_t k0, int32_t k1, int32_t min_last,
                                  int32_t max_last) {
  if (k0 > q1 || max_last < q0) return Tile::kDead;
  return k1 <= q0 && min_last >= q1 ? Tile::kFull : Tile::kPartial;
}

// Number of queries below `tokens` that can read key j: its share of the causal triangle.
NATSLM_HD constexpr int64_t queries_served(int32_t j, int32_t last, int32_t tokens) {
  const int32_t end = last < tokens - 1 ? last : tokens - 1;
  return end < j ? 0 : int64_t{end} - j + 1;
}

}  // namespace natslm
