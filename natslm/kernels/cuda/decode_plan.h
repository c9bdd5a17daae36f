// How the GPU decode kernels cut their work: pure functions that host and device share.
//
// Rows are packed: the group's query heads of a position lie together, so packed row m of a
// sequence is query m / group, head m % group of the KV head. A list's work is cut into tiles of
// packed rows times pieces of keys. The cut depends on the list's own rows and count alone, so
// neither its neighbours nor the GPU's size change a result. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/kernels/attention_decode.h"

namespace natslm::kernels::cuda {

// Packed rows of a tile. Up to kFewRows of them are one tile whose warps share the keys of a page
// among them (a decode step); more are cut into tiles of kManyRows, 16 to a warp (a prefill chunk).
inline constexpr int32_t kFewRows = 16;
inline constexpr int32_t kManyRows = 64;

// Most pieces of a list: enough that the last round of work on a GPU of some 250 blocks is short
// beside the others, few enough that putting them together stays cheap. A tile of many rows writes
// far more per piece and there are more tiles, so all tiles of a list share kManyRowsPieces.
inline constexpr int32_t kFewRowsPieces = 256;
inline constexpr int32_t kManyRowsPieces = 64;

// Pages of the smallest pieces. A short list is cut finer: with few lists there would be less than
// a piece for every block, and what is read is too little to pay for more partial results.
inline constexpr int32_t kFewRowsPages = 4;
inline constexpr int32_t kShortListPages = 2;
inline constexpr int32_t kShortList = 64;  // pages
inline constexpr int32_t kManyRowsPages = 16;

NATSLM_HD constexpr int32_t pages_of(int32_t keys) {
  return keys / kPageKeys + (keys % kPageKeys != 0);
}

// How the work on one list is cut.
struct ListCut {
  int32_t tiles = 0;        // of packed rows; 0 without rows
  int32_t piece_pages = 1;  // pages of every piece but the last
  int32_t pieces = 1;       // an empty list has one piece, of no pages
  int32_t most_pieces = 1;  // pieces double in size rather than become more than this

  NATSLM_HD constexpr int32_t items() const { return tiles * pieces; }
};

NATSLM_HD constexpr ListCut cut_list(int32_t packed_rows, int32_t count) {
  ListCut cut;
  const int32_t pages = pages_of(count);
  if (packed_rows <= kFewRows) {
    cut.tiles = packed_rows > 0;
    cut.piece_pages = pages <= kShortList ? kShortListPages : kFewRowsPages;
    cut.most_pieces = kFewRowsPieces;
  } else {
    cut.tiles = (packed_rows - 1) / kManyRows + 1;
    cut.piece_pages = kManyRowsPages;
    if (cut.tiles < kManyRowsPieces) cut.most_pieces = kManyRowsPieces / cut.tiles;
  }
  while (int64_t{cut.piece_pages} * cut.most_pieces < pages) cut.piece_pages *= 2;
  if (pages > cut.piece_pages) cut.pieces = (pages - 1) / cut.piece_pages + 1;
  return cut;
}

// Rows of the partial results that the pieces of a list leave for the combining pass: packed row m
// of piece p is row p * packed_rows + m of the list's part. A single piece writes the output
// itself.
NATSLM_HD constexpr int32_t partial_rows(int32_t packed_rows, const ListCut& cut) {
  return cut.pieces > 1 ? cut.pieces * packed_rows : 0;
}

// Most pieces that a list of up to `max_count` keys has: where pieces grow, a shorter list may have
// more of them.
NATSLM_HD constexpr int32_t max_pieces(int32_t packed_rows, int32_t max_count) {
  const ListCut cut = cut_list(packed_rows, max_count);
  if (packed_rows > kFewRows) {
    return cut.piece_pages > kManyRowsPages ? cut.most_pieces : cut.pieces;
  }
  if (cut.piece_pages > kFewRowsPages) return cut.most_pieces;
  constexpr int32_t kOfShort = kShortList / kShortListPages;
  return cut.piece_pages == kFewRowsPages && cut.pieces < kOfShort ? kOfShort : cut.pieces;
}

NATSLM_HD constexpr int64_t max_partial_rows(int32_t packed_rows, int32_t max_count) {
  const int32_t pieces = max_pieces(packed_rows, max_count);
  return pieces > 1 ? int64_t{pieces} * packed_rows : 0;
}

}  // namespace natslm::kernels::cuda
