// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/crossover.h"

#include <gtest/gtest.h>

#include <set>

namespace natslm::kernels {
namespace {

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward};

TEST(Crossover, HasAPathForEveryShapeOnEveryKindOfGpu) {
  for (const Pass pass : kPasses) {
    for (const int head_dim : {64, 128}) {
      for (int group = 1; group <= 8; ++group) {
        for (int tokens = 1; tokens <= 1 << 21; tokens *= 2) {
          for (const double density : {0.01, 0.1, 0.5, 0.9, 1.0}) {
            const AttentionShape shape = {
                pass, head_dim, group, tokens, density, false, tokens % 3 * int64_t{tokens} * 1000};
            const auto hopper = choose_path(shape, [](AttentionPath) { return true; });
            ASSERT_TRUE(hopper.has_value());
            const auto older = choose_path(shape, [](AttentionPath p) { return !is_sm90(p); });
            ASSERT_TRUE(older.has_value());
            EXPECT_FALSE(is_sm90(*older));
            const auto unsorted = choose_path(shape, [](AttentionPath p) { return !is_sorted(p); });
            ASSERT_TRUE(unsorted.has_value());
            EXPECT_FALSE(is_sorted(*unsorted));
          }
        }
      }
    }
  }
}

TEST(Crossover, TakesTheLastRowThatCoversTheShape) {
  for (const Crossover& row : crossovers()) {
    const AttentionShape shape = {row.pass,         row.head_dim ? row.head_dim : 64,
                                  row.most_group,   row.from_tokens,
                                  row.most_density, row.every_key,
                                  row.from_rows};
    EXPECT_TRUE(covers(row, shape));
    const auto only_this = choose_path(shape, [&](AttentionPath p) { return p == row.path; });
    EXPECT_EQ(only_this, row.path);
  }
  EXPECT_EQ(choose_path({}, [](AttentionPath) { return false; }), std::nullopt);
}

TEST(Crossover, CountsTheRowsOfTheWholeBatch) {
  const auto shape = [](int64_t rows) {
    return AttentionShape{Pass::kForward, 128, 4, 512, 0.5, false, rows};
  };
  const auto all = [](AttentionPath) { return true; };
  EXPECT_EQ(choose_path(shape(32 * 512), all), AttentionPath::kSm90Short);
  EXPECT_EQ(choose_path(shape(32 * 32 * 512), all), AttentionPath::kSm90Whole);
}

TEST(Crossover, TheLibraryIsTakenOnlyWhereEveryKeyIsKnownToBeVisible) {
  for (const Crossover& row : crossovers()) {
    EXPECT_TRUE(row.every_key || row.path != AttentionPath::kLibrary);
    EXPECT_FALSE(row.every_key && is_sorted(row.path));
  }
  for (const Pass pass : kPasses) {
    for (int tokens = 1; tokens <= 1 << 21; tokens *= 2) {
      for (const double density : {0.1, 1.0}) {
        const AttentionShape shape = {pass, 64, 1, tokens, density};
        EXPECT_NE(choose_path(shape, [](AttentionPath) { return true; }), AttentionPath::kLibrary);
      }
    }
  }
}

TEST(Crossover, TheLibraryServesWhatNoKernelHereCan) {
  const auto library_alone = [](AttentionPath path) { return path == AttentionPath::kLibrary; };
  const auto none = [](AttentionPath) { return false; };
  for (const int head_dim : {8, 64, 80, 128, 256}) {
    for (const int tokens : {1, 100, 4096, 1 << 20}) {
      for (const bool gradient : {false, true}) {
        const AttentionShape shape = {.head_dim = head_dim, .group = 1, .tokens = tokens};
        EXPECT_TRUE(takes_library(shape, gradient, library_alone));
        EXPECT_FALSE(takes_library(shape, gradient, none));
      }
    }
  }
}

TEST(Crossover, WithAGradientTheBackwardPassDecidesForBoth) {
  for (const int head_dim : {64, 128}) {
    for (const int tokens : {128, 1024, 16384, 131072}) {
      AttentionShape shape = {Pass::kForward, head_dim, 4, tokens, 1, true};
      const auto all = [](AttentionPath) { return true; };
      const bool forward = choose_path(shape, all) == AttentionPath::kLibrary;
      shape.pass = Pass::kBackward;
      const bool backward = choose_path(shape, all) == AttentionPath::kLibrary;
      shape = {.head_dim = head_dim, .group = 4, .tokens = tokens, .density = 0.1};
      EXPECT_EQ(takes_library(shape, false, all), forward);
      EXPECT_EQ(takes_library(shape, true, all), backward);
    }
  }
}

TEST(Crossover, NamesEveryPathOnceAndReadsThemBack) {
  std::set<std::string_view> names;
  for (const AttentionPath path : kAttentionPaths) {
    EXPECT_TRUE(names.insert(name(path)).second);
    EXPECT_EQ(attention_path(name(path)), path);
    EXPECT_EQ(name(path).ends_with("sorted"), is_sorted(path));
    EXPECT_EQ(name(path).starts_with("sm90"), is_sm90(path));
    EXPECT_EQ(name(path) == "library", path == AttentionPath::kLibrary);
  }
  EXPECT_EQ(attention_path("cpu"), std::nullopt);
}

TEST(Crossover, ASortedPathAsksForAnOrder) {
  AttentionForward p;
  p.batch = p.q_heads = p.kv_heads = p.tokens = 1;
  p.head_dim = 64;
  for (const AttentionPath path : kAttentionPaths) {
    EXPECT_EQ(why_not(p, path).find("needs an order") != std::string::npos, is_sorted(path));
  }
  const auto ordered = shape_only<AttentionBackward>(1, 1, 1, 1, 64, true);
  for (const AttentionPath path : kAttentionPaths) {
    EXPECT_EQ(why_not(ordered, path).find("needs an order"), std::string::npos);
  }
  EXPECT_NE(why_not(ordered, AttentionPath::kLibrary), "");
}

}  // namespace
}  // namespace natslm::kernels
