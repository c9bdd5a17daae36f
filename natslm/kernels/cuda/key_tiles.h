// Which keys the portable GPU kernels put into a tile: index arithmetic alone, the same on the CPU,
// where it is tested exhaustively.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/sorted_keys.h"

namespace natslm::kernels::cuda {

// Rows of a query tile, position-major: row r is head r % group of the group and position
// r / group of the tile. Exact for rows below 4096.
struct PackedRows {
  int32_t group;
  int32_t reciprocal;  // 2^16 / group, rounded up

  NATSLM_HD constexpr int32_t position(int32_t row) const { return row * reciprocal >> 16; }
  NATSLM_HD constexpr int32_t head(int32_t row) const { return row - position(row) * group; }
};
NATSLM_HD constexpr PackedRows packed_rows(int32_t group) {
  return {group, (65536 + group - 1) / group};
}

// The runs of a query tile one after the other, what every query reads first, so that a tile of
// keys can take up where the last one stopped, across the ends of runs, and few tiles need tests.
// Key number n, 0 <= n < total(), is at place place_of(pieces, n) of the order; numbers below
// `full` are read by every query of the tile.
struct KeyPieces {
  static constexpr int kCount = 3 * KeyOrder::kSegments;
  int32_t end[kCount];    // one past a piece's last number; ascends
  int32_t shift[kCount];  // place - number in the piece
  int32_t full;

  NATSLM_HD constexpr int32_t total() const { return end[kCount - 1]; }
};

NATSLM_HD constexpr KeyPieces pieces_of(const KeyRun* runs) {
  KeyPieces pieces{};
  int32_t numbers = 0;
  int piece = 0;
  const auto append = [&](int32_t begin, int32_t end) {
    pieces.shift[piece] = begin - numbers;
    numbers += end - begin;
    pieces.end[piece++] = numbers;
  };
  for (int s = 0; s < KeyOrder::kSegments; ++s) append(runs[s].full_begin, runs[s].full_end);
  pieces.full = numbers;
  for (int s = 0; s < KeyOrder::kSegments; ++s) {
    append(runs[s].begin, runs[s].full_begin);
    append(runs[s].full_end, runs[s].end);
  }
  return pieces;
}

// Keys 0 .. keys - 1 at the places of their numbers (position order); `full` is not known.
NATSLM_HD constexpr KeyPieces whole_piece(int32_t keys) {
  KeyPieces pieces{};
  for (int32_t& end : pieces.end) end = keys;
  return pieces;
}

NATSLM_HD constexpr int32_t place_of(const KeyPieces& pieces, int32_t number) {
  int32_t shift = pieces.shift[KeyPieces::kCount - 1];
  for (int p = KeyPieces::kCount - 2; p >= 0; --p) {
    if (number < pieces.end[p]) shift = pieces.shift[p];
  }
  return number + shift;
}

// Places [begin, end) of the order that one block of a key-parallel kernel owns. A span does not
// cross the end of a segment: keys that live for ever and keys that live briefly are wanted by very
// different queries. Places past a length hold no key; there the block only writes zeros.
struct KeySpan {
  int32_t begin, end;
  bool past_length;
};

// ends: of the segments; the last one is the length. Position order is one segment: all three the
// length. Beyond the last span: empty.
NATSLM_HD constexpr KeySpan key_span(int32_t number, const int32_t (&ends)[KeyOrder::kSegments],
                                     int32_t tokens, int32_t keys_of_span) {
  int32_t begin = 0;
  for (int s = 0; s <= KeyOrder::kSegments; ++s) {
    const bool past_length = s == KeyOrder::kSegments;
    const int32_t end = past_length ? tokens : ends[s];
    const int32_t spans = (end - begin + keys_of_span - 1) / keys_of_span;
    if (number < spans) {
      const int32_t first = begin + number * keys_of_span;
      return {first, end - first < keys_of_span ? end : first + keys_of_span, past_length};
    }
    number -= spans;
    begin = end;
  }
  return {tokens, tokens, true};
}

// At least as many as key_span has, whatever the ends.
NATSLM_HD constexpr int32_t key_span_count(int32_t tokens, int32_t keys_of_span) {
  return (tokens + keys_of_span - 1) / keys_of_span + KeyOrder::kSegments;
}

// The order in which the blocks of a key-parallel kernel start: some heads at a time, whose queries
// then stay in the L2 cache, and among them early spans first, which the most queries read.
struct HeadSpan {
  int32_t head, span;
};
NATSLM_HD constexpr HeadSpan head_span(int32_t block, int32_t heads, int32_t spans,
                                       int32_t heads_together) {
  const int32_t first = block / (heads_together * spans) * heads_together;
  const int32_t rest = block - first * spans;
  const int32_t together = heads - first < heads_together ? heads - first : heads_together;
  return {first + rest % together, rest / together};
}

}  // namespace natslm::kernels::cuda
