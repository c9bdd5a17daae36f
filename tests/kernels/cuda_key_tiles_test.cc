// Index arithmetic of the portable GPU kernels, against its definition, for every small problem.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <vector>

#include "natslm/kernels/cuda/key_tiles.h"

namespace natslm::kernels::cuda {
namespace {

TEST(PackedRows, DivideLikeIntegersForEveryGroup) {
  for (int32_t group = 1; group <= 8; ++group) {
    const PackedRows rows = packed_rows(group);
    for (int32_t row = 0; row < 4096; ++row) {
      ASSERT_EQ(rows.position(row), row / group) << "group " << group;
      ASSERT_EQ(rows.head(row), row % group) << "group " << group;
    }
  }
}

// Three segments of up to 3 places with every run inside them.
std::vector<KeyRun> all_runs(int32_t first, int32_t places) {
  std::vector<KeyRun> runs;
  for (int32_t a = 0; a <= places; ++a) {
    for (int32_t b = a; b <= places; ++b) {
      for (int32_t c = b; c <= places; ++c) {
        for (int32_t d = c; d <= places; ++d) {
          runs.push_back({first + a, first + b, first + c, first + d});
        }
      }
    }
  }
  return runs;
}

TEST(KeyPieces, VisitEveryPlaceOfTheRunsOnceAndTheFullPartsFirst) {
  for (const KeyRun& first : all_runs(5, 2)) {
    for (const KeyRun& second : all_runs(7, 3)) {
      for (const KeyRun& third : all_runs(10, 2)) {
        const KeyRun runs[] = {first, second, third};
        std::set<int32_t> full, partial;
        for (const KeyRun& run : runs) {
          for (int32_t p = run.begin; p < run.end; ++p) {
            (p >= run.full_begin && p < run.full_end ? full : partial).insert(p);
          }
        }
        const KeyPieces pieces = pieces_of(runs);
        ASSERT_EQ(pieces.total(), static_cast<int32_t>(full.size() + partial.size()));
        ASSERT_EQ(pieces.full, static_cast<int32_t>(full.size()));
        for (int32_t n = 0; n < pieces.total(); ++n) {
          ASSERT_EQ((n < pieces.full ? full : partial).erase(place_of(pieces, n)), 1u);
        }
      }
    }
  }
}

TEST(KeyPieces, OfPositionOrderAreTheNumbersThemselves) {
  const KeyPieces pieces = whole_piece(7);
  EXPECT_EQ(pieces.total(), 7);
  EXPECT_EQ(pieces.full, 0);
  for (int32_t n = 0; n < 7; ++n) EXPECT_EQ(place_of(pieces, n), n);
}

TEST(KeySpans, CoverEveryPlaceOnceAndCrossNoSegment) {
  for (int32_t tokens = 0; tokens <= 9; ++tokens) {
    for (int32_t length = 0; length <= tokens; ++length) {
      for (int32_t e0 = 0; e0 <= length; ++e0) {
        for (int32_t e1 = e0; e1 <= length; ++e1) {
          for (int32_t keys = 1; keys <= 4; ++keys) {
            const int32_t ends[] = {e0, e1, length};
            const auto segment = [&](int32_t place) {
              return std::upper_bound(ends, ends + 3, place) - ends;
            };
            int32_t next = 0;
            for (int32_t n = 0; n < key_span_count(tokens, keys); ++n) {
              const KeySpan span = key_span(n, ends, tokens, keys);
              if (span.begin == span.end) continue;
              ASSERT_EQ(span.begin, next);
              ASSERT_LE(span.end - span.begin, keys);
              ASSERT_EQ(segment(span.begin), segment(span.end - 1));
              ASSERT_EQ(span.past_length, span.begin >= length);
              next = span.end;
            }
            ASSERT_EQ(next, tokens) << length << " " << e0 << " " << e1 << " " << keys;
          }
        }
      }
    }
  }
}

TEST(HeadSpans, VisitEverySpanOfEveryHeadOnceAndSpansOfAHeadInOrder) {
  for (int32_t heads = 1; heads <= 7; ++heads) {
    for (int32_t spans = 1; spans <= 5; ++spans) {
      for (int32_t together = 1; together <= heads; ++together) {
        std::vector<int32_t> next(heads, 0);
        for (int32_t block = 0; block < heads * spans; ++block) {
          const HeadSpan at = head_span(block, heads, spans, together);
          ASSERT_GE(at.head, 0);
          ASSERT_LT(at.head, heads);
          ASSERT_EQ(at.span, next[at.head]++);
        }
        for (const int32_t n : next) ASSERT_EQ(n, spans);
      }
    }
  }
}

}  // namespace
}  // namespace natslm::kernels::cuda
