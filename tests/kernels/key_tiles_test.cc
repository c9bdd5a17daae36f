// How the Hopper kernels cut what a query tile reads into tiles of keys (no GPU needed).
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/key_tiles.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace natslm::kernels::sm90 {
namespace {

// The runs of a query tile, in order.
struct Runs {
  const std::vector<KeyRun>& runs;
  size_t taken = 0;
  bool next(KeyRun& run) {
    if (taken == runs.size()) return false;
    run = runs[taken++];
    return true;
  }
};

std::string describe(const std::vector<KeyRun>& runs, int32_t length) {
  std::string text = "length " + std::to_string(length);
  for (const KeyRun& run : runs) {
    text += ", [" + std::to_string(run.begin) + ", " + std::to_string(run.end) + ") full [" +
            std::to_string(run.full_begin) + ", " + std::to_string(run.full_end) + ")";
  }
  return text;
}

// Walks the tiles as the producer does. "" if every row of every run comes exactly once, no row
// past the length is touched and no tile is longer than needed; otherwise what is wrong.
std::string walk(const std::vector<KeyRun>& runs, int32_t length) {
  std::vector<int> brought(std::max(length, 1)), wanted(brought.size());
  std::vector<bool> full(brought.size());
  int64_t pieces_needed = 0;
  for (const KeyRun& run : runs) {
    for (int32_t row = run.begin; row < run.end; ++row) ++wanted[row];
    for (int32_t row = run.full_begin; row < run.full_end; ++row) full[row] = true;
    pieces_needed += (run.end - run.begin + kPieceKeys - 1) / kPieceKeys;
  }
  Runs source{runs};
  KeyCursor cursor = first_run(source);
  int64_t pieces = 0;
  while (!cursor.done) {
    const TileKeys kind = tile_keys(cursor);
    if (kind != TileKeys::kMixed) {
      for (int32_t i = 0; i < kTileKeys; ++i) {
        const int32_t row = cursor.row + i;
        if (row >= length) return "a row past the length";
        if (kind == TileKeys::kFull && !full[row]) return "full, but a query may not see a key";
        ++brought[row];
      }
      pieces += kTilePieces;
      advance(cursor, source, kTileKeys);
      continue;
    }
    bool padded = false;
    for (int32_t p = 0; p < kTilePieces; ++p) {
      const Piece piece = take_piece(cursor, source, length);
      if (piece.row + kPieceKeys > std::max(length, 0)) return "a piece past the length";
      if (piece.first >= piece.end) {
        padded = true;
        if (piece.row > -kPieceKeys) return "padding that reads something";
        continue;
      }
      if (padded) return "a piece after padding";
      if (piece.first < piece.row || piece.end > piece.row + kPieceKeys) return "keys not loaded";
      for (int32_t row = piece.first; row < piece.end; ++row) ++brought[row];
      ++pieces;
    }
    if (padded && !cursor.done) return "padding before the end";
  }
  if (brought != wanted) return "a row is missing or comes twice";
  if (pieces != pieces_needed) return "more pieces than needed";
  return "";
}

TEST(KeyTiles, EveryRowOfTwoRunsComesOnceWhateverTheirEnds) {
  for (const int32_t length : {1, 7, 15, 16, 17, 130, 300, 420}) {
    const std::vector<int32_t> marks{0, 1, 15, 16, 17, 100, 128, 129, 144, 257, 290, 300, 419, 420};
    std::vector<int32_t> ends;
    for (const int32_t mark : marks) {
      if (mark <= length) ends.push_back(mark);
    }
    for (const int32_t a : ends) {
      for (const int32_t b : ends) {
        for (const int32_t c : ends) {
          for (const int32_t d : ends) {
            if (!(a <= b && b <= c && c <= d)) continue;
            const std::vector<KeyRun> runs{{a, a, b, b}, {c, c, c, d}, {0, 0, 0, 0}};
            ASSERT_EQ(walk(runs, length), "") << describe(runs, length);
          }
        }
      }
    }
  }
}

TEST(KeyTiles, ATileIsFullOnlyInsideTheFullPartOfItsRun) {
  for (int32_t full_begin = 0; full_begin <= 300; full_begin += 5) {
    for (int32_t full_end = full_begin; full_end <= 500; full_end += 7) {
      const std::vector<KeyRun> runs{{0, full_begin, full_end, 500}};
      ASSERT_EQ(walk(runs, 500), "") << describe(runs, 500);
    }
  }
}

TEST(KeyTiles, NothingIsReadWhereNoQuerySeesAKey) {
  const std::vector<KeyRun> runs{{0, 0, 0, 0}, {5, 5, 5, 5}, {0, 0, 0, 0}};
  EXPECT_EQ(walk(runs, 10), "");
  Runs source{runs};
  EXPECT_TRUE(first_run(source).done);
}

// Takes all runs out of a group and checks them against the bits one by one.
void expect_blocks(uint32_t live, uint32_t full, int32_t end_key) {
  BlockGroup group{live, full};
  constexpr int32_t kGroupBlock = 64;
  uint32_t taken = 0;
  int32_t previous_end = 0;
  while (group.live != 0) {
    const KeyRun run = take_blocks(group, kGroupBlock, end_key);
    ASSERT_GE(run.begin, previous_end);
    previous_end = run.end;
    ASSERT_LE(run.end, end_key);
    ASSERT_EQ(run.begin % cuda::kBoundKeys, 0);
    const int32_t first = run.begin / cuda::kBoundKeys - kGroupBlock;
    const int32_t end = (run.end + cuda::kBoundKeys - 1) / cuda::kBoundKeys - kGroupBlock;
    const bool is_full = (full >> first & 1) != 0;
    ASSERT_EQ(run.full_begin, run.begin);
    ASSERT_EQ(run.full_end, is_full ? run.end : run.begin);
    for (int32_t block = first; block < end; ++block) {
      ASSERT_TRUE(live >> block & 1);
      ASSERT_EQ((full >> block & 1) != 0, is_full);
      ASSERT_FALSE(taken >> block & 1);
      taken |= uint32_t{1} << block;
    }
  }
  ASSERT_EQ(taken, live) << "full " << full;
}

TEST(KeyTiles, RunsOfLiveBlocksAreTheLiveBlocks) {
  constexpr int32_t kAll = (64 + 32) * cuda::kBoundKeys;
  for (uint32_t live = 0; live < 256; ++live) {
    for (uint32_t full = 0; full < 256; ++full) {
      for (const int shift : {0, 5, 24}) {
        expect_blocks(live << shift, full << shift, kAll);
        // The last block of the group is cut short by the diagonal.
        if (shift == 24) expect_blocks(live << shift, full << shift, kAll - 63);
      }
    }
  }
  expect_blocks(~0u, ~0u, kAll);
  expect_blocks(~0u, 0, kAll - 1);
  expect_blocks(~0u, 0x0000ffffu, kAll);
}

TEST(DealtItems, AreEachTakenOnceAndEvenly) {
  for (const int32_t blocks : {1, 2, 5, 132}) {
    for (const int32_t items : {1, 4, 131, 132, 133, 264, 1000}) {
      std::vector<int32_t> takers(items, 0);
      std::vector<int64_t> sums(blocks, 0);
      for (int32_t block = 0; block < blocks; ++block) {
        for (int32_t round = 0; round * blocks < items; ++round) {
          const int32_t item = dealt_item(round, block, blocks);
          if (item < items) ++takers[item], sums[block] += item;
        }
      }
      EXPECT_EQ(takers, std::vector<int32_t>(items, 1));
      if (items % (2 * blocks) == 0) {
        EXPECT_EQ(*std::ranges::min_element(sums), *std::ranges::max_element(sums));
      }
    }
  }
}

}  // namespace
}  // namespace natslm::kernels::sm90
