// How the GPU decode kernels cut their work and lay out their pages, on the CPU.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "natslm/kernels/attention_decode.h"
#include "natslm/kernels/cuda/decode_plan.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int32_t kRows[] = {0, 1, 4, 8, 15, 16, 17, 63, 64, 65, 128, 129, 1000, 4096, 4097, 9000};

TEST(DecodePlan, PiecesCoverAllPagesOnceAndRespectTheirLimits) {
  for (const int32_t rows : kRows) {
    int32_t most = 0;
    for (int32_t count = 0; count < 3'000'000; count += count < 20'000 ? 1 : 4'999) {
      const ListCut cut = cut_list(rows, count);
      const int32_t pages = pages_of(count);
      ASSERT_GE(cut.pieces, 1);
      ASSERT_LE(cut.pieces, cut.most_pieces) << rows << " rows, " << count << " keys";
      ASSERT_GE(int64_t{cut.pieces} * cut.piece_pages, pages);
      ASSERT_LT((int64_t{cut.pieces} - 1) * cut.piece_pages, std::max(pages, 1));
      ASSERT_EQ(cut.tiles, rows == 0          ? 0
                           : rows <= kFewRows ? 1
                                              : (rows + kManyRows - 1) / kManyRows);
      // What was set aside for longer lists is enough for shorter ones.
      most = std::max(most, cut.pieces);
      ASSERT_GE(max_pieces(rows, count), most) << rows << " rows, " << count << " keys";
      ASSERT_GE(max_partial_rows(rows, count), partial_rows(rows, cut));
    }
  }
}

TEST(DecodePlan, ALongListOfOneRowHasEnoughPiecesForTheWholeGpu) {
  for (int32_t count = 64 * 1024; count < 4'000'000; count += 9'999) {
    EXPECT_GE(cut_list(4, count).pieces, 128) << count;
  }
}

TEST(DecodePlan, AShortListOfOneRowIsCutFiner) {
  for (int32_t count = 1; count < 20'000; ++count) {
    const ListCut cut = cut_list(4, count);
    EXPECT_EQ(cut.piece_pages, pages_of(count) <= kShortList ? kShortListPages : kFewRowsPages);
  }
  EXPECT_EQ(max_pieces(4, 65 * kPageKeys), 32);  // 64 pages have more pieces than 65
  EXPECT_EQ(cut_list(4, 65 * kPageKeys).pieces, 17);
}

TEST(DecodePlan, WholeListsMayHaveAnyCount) {
  EXPECT_EQ(pages_of(0), 0);
  EXPECT_EQ(pages_of(1), 1);
  EXPECT_EQ(pages_of(64), 1);
  EXPECT_EQ(pages_of(65), 2);
  EXPECT_EQ(pages_of(kMaxPosition), 33554432);
  EXPECT_LE(cut_list(1, kMaxPosition).pieces, kFewRowsPieces);
}

TEST(GpuPage, HasAPlaceForEveryElementAndEightRowsInDifferentBanks) {
  for (const int32_t head_dim : {64, 128}) {
    const GpuPage page{head_dim};
    std::set<int32_t> places;
    for (int32_t slot = 0; slot < kPageKeys; ++slot) {
      for (int32_t channel = 0; channel < head_dim; ++channel) {
        const int32_t at = page.element(slot, channel);
        ASSERT_GE(at, 0);
        ASSERT_LT(at, kPageKeys * head_dim);
        places.insert(at);
      }
      for (int32_t channel = 0; channel < head_dim; channel += GpuPage::kPieceElements) {
        ASSERT_EQ(page.element(slot, channel + 7), page.element(slot, channel) + 7);
      }
    }
    EXPECT_EQ(std::ssize(places), kPageKeys * head_dim);
    for (int32_t first = 0; first < kPageKeys; first += 8) {
      for (int32_t channel = 0; channel < head_dim; channel += GpuPage::kPieceElements) {
        std::set<int32_t> banks;  // of 16 bytes; 8 of them are all there are
        for (int32_t slot = first; slot < first + 8; ++slot) {
          banks.insert(page.element(slot, channel) / GpuPage::kPieceElements % 8);
        }
        ASSERT_EQ(banks.size(), 8u);
      }
    }
    EXPECT_EQ(page.bytes(), page_bytes(head_dim, DType::kBFloat16) + GpuPage::kMetadataBytes);
    EXPECT_EQ(page.bytes() % 256, 0);
  }
}

}  // namespace
}  // namespace natslm::kernels::cuda
