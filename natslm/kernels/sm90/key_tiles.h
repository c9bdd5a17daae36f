// What a query tile reads, cut into tiles of keys for the tensor cores.
//
// A reader is handed runs of rows of K and V (KeyRun: rows that hold every key some query of the
// tile sees, with the part of them that all queries see) and packs them without gaps: a tile of
// kTileKeys keys is made of kTilePieces pieces of consecutive rows, and pieces of different runs
// share a tile, so that the ends of a run waste half a piece on average and not half a tile.
// Pure functions: the producer warp runs them with the same values in all lanes, tests on a CPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/sorted_keys.h"

namespace natslm::kernels::sm90 {

using cuda::KeyRun;

inline constexpr int32_t kTileKeys = 128;
inline constexpr int32_t kPieceKeys = 16;
inline constexpr int32_t kTilePieces = kTileKeys / kPieceKeys;

// Rows [row, row + kPieceKeys) are loaded; of these, [first, end) hold keys of the run that no
// other piece brings. Rows outside the array are zeros. Every loaded row is below the length,
// because what lies past it may be NaN, and 0 * NaN would spoil a result: `row` is moved back where
// needed.
struct Piece {
  int32_t row, first, end;
};
inline constexpr Piece kPadding{-kPieceKeys, 0, 0};

// How the keys of a tile are known to stand to the queries.
enum class TileKeys : uint8_t {
  kMixed,       // pieces, one by one
  kContiguous,  // kTileKeys consecutive rows, all of one run
  kFull,        // likewise, and every query sees every key
};

// The next row to read: in `run` at `row`, or nothing is left.
struct KeyCursor {
  KeyRun run{};
  int32_t row = 0;
  bool done = true;
};

// Moves to the first run that is not empty. Source: bool next(KeyRun&), false after the last run.
template <class Source>
NATSLM_HD constexpr void next_run(KeyCursor& cursor, Source& source) {
  cursor.done = true;
  while (cursor.done && source.next(cursor.run)) {
    cursor.row = cursor.run.begin;
    cursor.done = cursor.run.begin >= cursor.run.end;
  }
}

template <class Source>
NATSLM_HD constexpr KeyCursor first_run(Source& source) {
  KeyCursor cursor;
  next_run(cursor, source);
  return cursor;
}

template <class Source>
NATSLM_HD constexpr void advance(KeyCursor& cursor, Source& source, int32_t rows) {
  cursor.row += rows;
  if (cursor.row >= cursor.run.end) next_run(cursor, source);
}

NATSLM_HD constexpr TileKeys tile_keys(const KeyCursor& cursor) {
  const int32_t end = cursor.row + kTileKeys;
  if (cursor.done || end > cursor.run.end) return TileKeys::kMixed;
  const bool full = cursor.row >= cursor.run.full_begin && end <= cursor.run.full_end;
  return full ? TileKeys::kFull : TileKeys::kContiguous;
}

// The next piece of a mixed tile; padding once the runs are at their end.
template <class Source>
NATSLM_HD constexpr Piece take_piece(KeyCursor& cursor, Source& source, int32_t length) {
  if (cursor.done) return kPadding;
  const int32_t first = cursor.row, limit = first + kPieceKeys;
  const int32_t end = limit < cursor.run.end ? limit : cursor.run.end;
  const Piece piece{limit > length ? length - kPieceKeys : first, first, end};
  advance(cursor, source, kPieceKeys);
  return piece;
}

// Position order: 32 blocks of kBoundKeys keys at a time, one bit each. `full` counts only where
// `live` is set.
struct BlockGroup {
  uint32_t live = 0, full = 0;
};

// Index of the lowest set bit; bits != 0.
NATSLM_HD constexpr int32_t lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int32_t>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Takes the first run of live blocks of one kind out of the group (which has one) whose block 0 is
// `group_block`. Keys from `end_key` on are not read by any query.
NATSLM_HD constexpr KeyRun take_blocks(BlockGroup& group, int32_t group_block, int32_t end_key) {
  const int32_t first = lowest_bit(group.live);
  const bool full = (group.full >> first & 1) != 0;
  const uint32_t kind = group.live & (full ? group.full : ~group.full);
  const uint32_t other = ~(kind >> first);  // bit 0 is clear
  const int32_t count = other == 0 ? 32 : lowest_bit(other);
  group.live &= count == 32 ? 0 : ~(((uint32_t{1} << count) - 1) << first);
  const int32_t begin = (group_block + first) * cuda::kBoundKeys;
  const int32_t blocks_end = begin + count * cuda::kBoundKeys;
  const int32_t end = blocks_end < end_key ? blocks_end : end_key;
  return {begin, begin, full ? end : begin, end};
}

// A list of items, the longest first, dealt out to `blocks` blocks beforehand: they take items in
// turn, and every second time from the other end. Which item a block has in a round; the last round
// may have none for it.
NATSLM_HD constexpr int32_t dealt_item(int32_t round, int32_t block, int32_t blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

}  // namespace natslm::kernels::sm90
