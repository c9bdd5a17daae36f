// What a query tile reads of a short text: a list of its living keys, which the block that owns the
// tile makes for itself from `last` alone. No order of the keys, no plan, no launch beforehand.
// Pure functions, the same on the device and in tests.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"

namespace natslm::kernels::sm90 {

// The longest text whose keys are listed. A block goes through `last` of all keys up to its
// queries, which costs little beside attention to the living ones here, and grows with the square
// of the length. The list takes 4 bytes of shared memory a key.
inline constexpr int32_t kShortTokens = 2048;
// Keys of a tile.
inline constexpr int32_t kListTile = 64;

// Division by the number of KV heads, without dividing: exact while head * kv_heads is below
// kMostHeadProducts.
inline constexpr int64_t kMostHeadProducts = int64_t{1} << 31;
NATSLM_HD constexpr uint32_t batch_factor_of(int32_t kv_heads) {
  return static_cast<uint32_t>((kMostHeadProducts + kv_heads - 1) / kv_heads);
}
NATSLM_HD constexpr int32_t batch_of(uint32_t head, uint32_t batch_factor) {
  return static_cast<int32_t>(uint64_t{head} * batch_factor >> 31);
}

// A key in the list: its position in the lower half, `last` in the upper one, where all that lives
// to the end of any short text is alike.
using ListedKey = uint32_t;
inline constexpr int32_t kListedForever = 0xffff;
// Fills up the last tile; no query reads it.
inline constexpr ListedKey kNoListedKey = 0xffff;
static_assert(kShortTokens < 0xffff);

// 0 <= position < kShortTokens, last >= 0.
NATSLM_HD constexpr ListedKey listed_key(int32_t position, int32_t last) {
  const int32_t until = last < kListedForever ? last : kListedForever;
  return static_cast<uint32_t>(until) << 16 | static_cast<uint32_t>(position);
}
NATSLM_HD constexpr int32_t position_of(ListedKey key) {
  return static_cast<int32_t>(key & 0xffff);
}
NATSLM_HD constexpr int32_t last_of(ListedKey key) {
  return static_cast<int32_t>(key >> 16);
}

// Positions q0 .. q1; none if q1 < q0.
struct QuerySpan {
  int32_t q0, q1;
};
// Keys that stand at or before one of the queries.
NATSLM_HD constexpr int32_t keys_up_to(const QuerySpan& span) {
  return span.q1 < span.q0 ? 0 : span.q1 + 1;
}

// The same for any `last`: a key that nobody reads is none.
NATSLM_HD constexpr ListedKey listed_key_or_none(int32_t position, int32_t last) {
  return last < 0 ? kNoListedKey : listed_key(position, last);
}
// A query reads a key that stands at or before it exactly if listed_key is at least this.
NATSLM_HD constexpr ListedKey least_key_for(int32_t query) {
  return static_cast<uint32_t>(query) << 16;
}

// Queries of `span` that are in rows [first_row, first_row + rows) of a tile whose row r is query
// span.q0 + r / group.
NATSLM_HD constexpr QuerySpan queries_of_rows(const QuerySpan& span, int32_t group,
                                              int32_t first_row, int32_t rows) {
  const int32_t last = span.q0 + (first_row + rows - 1) / group;
  return {span.q0 + first_row / group, last < span.q1 ? last : span.q1};
}

// Whether a key at most at span.q1 goes into the list of a tile.
NATSLM_HD constexpr bool is_listed(const QuerySpan& span, int32_t last) {
  return last >= span.q0;
}

// How some of a tile's queries stand to a listed key.
NATSLM_HD constexpr Tile reading_of(const QuerySpan& span, ListedKey key) {
  if (span.q1 < span.q0) return Tile::kDead;
  const int32_t position = position_of(key), last = last_of(key);
  return classify(span.q0, span.q1, position, position, last, last);
}

// Keys of the list are found by warps, each of which goes through consecutive keys, 32 a round.
NATSLM_HD constexpr int32_t list_rounds(int32_t keys, int32_t warps) {
  return (keys + 32 * warps - 1) / (32 * warps);
}

// Chunks of 16 bytes of a tile's row [D] of bfloat16 as wgmma wants them (hopper.cuh): byte in the
// tile, whose halves of 64 channels come one after the other.
NATSLM_HD constexpr int32_t chunk_offset(int32_t row, int32_t chunk) {
  return chunk / 8 * (kListTile * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

}  // namespace natslm::kernels::sm90
