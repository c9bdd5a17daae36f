// The order in which a whole prompt's keys are handed to the GPU kernels.
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/cache/prompt_attention.h"

namespace natslm::test {
namespace {

using cache::prompt_order;
using cache::PromptOrder;
using testing::ElementsAre;
using testing::IsEmpty;

PromptOrder order_of(const std::vector<std::vector<int32_t>>& last) {
  const std::vector<std::span<const int32_t>> lists(last.begin(), last.end());
  return prompt_order(lists);
}

TEST(PromptOrder, PutsWhatLivesForEverFirstAndTheWindowLast) {
  // G S L L G S S, W = 1: the Locals live until the Global at 4.
  const PromptOrder found = order_of({{kForever, 2, 4, 4, kForever, 6, 7}});
  EXPECT_THAT(found.order, ElementsAre(0, 4, 2, 1, 3, 5, 6));
  EXPECT_THAT(found.ends, ElementsAre(2, 3, 7));
  EXPECT_EQ(found.reach, 1);
  EXPECT_DOUBLE_EQ(found.density, (7 + 2 + 3 + 2 + 3 + 2 + 1) / 28.0);
}

TEST(PromptOrder, OfKeysThatAllLiveForEverIsTheirPositions) {
  const std::vector<int32_t> all(5, kForever);
  const PromptOrder found = order_of({all, all});
  EXPECT_THAT(found.order, ElementsAre(0, 1, 2, 3, 4, 0, 1, 2, 3, 4));
  EXPECT_THAT(found.ends, ElementsAre(5, 5, 5, 5, 5, 5));
  EXPECT_EQ(found.density, 1);
}

TEST(PromptOrder, LeavesLifetimesAloneThatHaveNone) {
  EXPECT_THAT(order_of({{0, 9, 8, 3, 4, 5, 6, 7}}).order, IsEmpty());
  EXPECT_THAT(order_of({{}}).order, IsEmpty());
  EXPECT_THAT(order_of({}).order, IsEmpty());
}

// What kernels::KeyOrder asks for, for the lifetimes of random roles with open ends.
TEST(PromptOrder, KeepsTheContractForRandomRoles) {
  for (uint32_t seed = 1; seed <= 200; ++seed) {
    std::mt19937 random(seed);
    const int32_t keys = 1 + static_cast<int32_t>(random() % 90),
                  window = static_cast<int32_t>(random() % 20);
    std::vector<std::vector<int32_t>> last(2, std::vector<int32_t>(keys));
    for (auto& list : last) {
      int32_t next = kOpenEnded;
      for (int32_t j = keys - 1; j >= 0; --j) {
        const auto kind = random() % 4;
        list[j] = j == 0 || kind == 0 ? kForever : kind == 1 ? next : j + window;
        if (list[j] == kForever) next = j;
      }
    }
    const PromptOrder found = order_of(last);
    if (found.order.empty()) continue;
    for (size_t set = 0; set < last.size(); ++set) {
      const int32_t* order = &found.order[set * keys];
      const int32_t* ends = &found.ends[set * 3];
      ASSERT_EQ(ends[2], keys);
      std::vector<int> seen(keys);
      for (int32_t place = 0; place < keys; ++place) {
        ++seen[order[place]];
        const int32_t its_last = last[set][order[place]];
        EXPECT_TRUE(place < ends[1] || its_last <= int64_t{order[place]} + found.reach);
        if (place == 0 || place == ends[0] || place == ends[1]) continue;
        EXPECT_LT(order[place - 1], order[place]);
        EXPECT_TRUE(place >= ends[1] || last[set][order[place - 1]] <= its_last);
      }
      EXPECT_THAT(seen, testing::Each(1));
    }
  }
}

}  // namespace
}  // namespace natslm::test
