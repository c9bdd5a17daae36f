// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/key_cap.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "tests/support/error_of.h"

namespace natslm::test {
namespace {

using policies::KeyCap;
using testing::HasSubstr;

cache::Shape shape_of(int32_t layers, int32_t heads, std::vector<int32_t> windows = {}) {
  cache::Shape shape{layers, heads, heads, 8};
  shape.windows = std::move(windows);
  return shape;
}

roles::Options options(int32_t window, int32_t chunk) {
  return {roles::RoleSet::kGls, window, chunk};
}

TEST(KeyCap, AFloorIsWhatNoRoleCouldHide) {
  for (const int32_t window : {0, 1, 3, 8}) {
    for (const int32_t chunk : {1, 2, 4, 5}) {
      for (const int32_t model_window : {0, 1, 2, 5, 9, 30}) {
        const KeyCap cap({0.01, 0}, shape_of(1, 3, {model_window}), options(window, chunk));
        for (int32_t t = 0; t < 40; ++t) {
          int32_t keys = 0;
          for (int32_t j = 0; j <= t; ++j) {
            const int32_t end_of_chunk = j / chunk * chunk + chunk - 1;
            const bool sliding = t <= end_of_chunk + window;  // what a Sliding key is read by
            const bool shown = model_window == 0 || t < j + model_window;
            keys += shown && (j == 0 || sliding);
          }
          ASSERT_EQ(cap.floor(0, t), 3 * keys) << "window " << window << ", chunk " << chunk
                                               << ", model's " << model_window << ", " << t;
        }
      }
    }
  }
}

TEST(KeyCap, TheTotalIsTheBudgetOrTheFloors) {
  const KeyCap share({0.3, 0}, shape_of(2, 2, {0, 6}), options(4, 1));
  const KeyCap number({0, 40}, shape_of(2, 2, {0, 6}), options(4, 1));
  for (int32_t t = 0; t < 100; ++t) {
    const int64_t floors = share.floor(0, t) + share.floor(1, t);
    EXPECT_EQ(share.total(t), std::max<int64_t>(floors, 3 * (4 * (t + 1)) / 10)) << t;
    EXPECT_EQ(number.total(t), 40) << t;
  }
  // Window, own key and token 0 in the first layer; the model's window in the second.
  EXPECT_EQ(share.floor(0, 50), 2 * 6);
  EXPECT_EQ(share.floor(1, 50), 2 * 5);
}

// Walks through every way in which the layers may use their rooms.
void use_all(const KeyCap& cap, int32_t layers, int32_t t) {
  const std::function<void(int32_t, int64_t)> from = [&](int32_t layer, int64_t used) {
    if (layer == layers) {
      ASSERT_LE(used, cap.total(t));
      return;
    }
    const int64_t room = cap.total(t) - used - cap.reserved_after(layer, t);
    ASSERT_GE(room, cap.floor(layer, t)) << "layer " << layer << ", query " << t;
    for (int64_t here = 0; here <= room; ++here) {
      from(layer + 1, used + here);
      if (testing::Test::HasFatalFailure()) return;
    }
  };
  from(0, 0);
}

TEST(KeyCap, NoUseOfTheRoomsPassesTheTotalAndNoRoomIsBelowAFloor) {
  const std::vector<std::vector<float>> shares{
      {}, {1, 0, 0}, {0, 0, 1}, {0.2f, 0.5f, 0.3f}, {1, 1, 100}, {0.9f, 0.05f, 0.05f}};
  for (const auto& windows : {std::vector<int32_t>{}, {3, 0, 0}, {0, 2, 9}, {1, 0, 4}}) {
    for (const auto& layer_shares : shares) {
      for (const policies::KeyBudget budget :
           {policies::KeyBudget{0.05, 0}, {0.37, 0}, {1, 0}, {0, 1}, {0, 31}}) {
        for (const auto& [window, chunk] : {std::pair{0, 1}, {3, 1}, {2, 3}}) {
          const KeyCap cap(budget, shape_of(3, 1, windows), options(window, chunk), layer_shares);
          for (const int32_t t : {0, 1, 2, 4, 7, 13}) {
            use_all(cap, 3, t);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(KeyCap, LayersThatUseTheirRoomsFullyGetTheirSharesOfTheKeys) {
  const std::vector<float> shares{0.1f, 0.4f, 0.3f, 0.2f};
  const KeyCap cap({0.25, 0}, shape_of(4, 2), options(16, 1), shares);
  for (const int32_t t : {1000, 1001, 4321, 100000}) {
    int64_t used = 0;
    for (int32_t layer = 0; layer < 4; ++layer) {
      const int64_t room = cap.total(t) - used - cap.reserved_after(layer, t);
      EXPECT_NEAR(static_cast<double>(room), shares[layer] * 0.25 * 8 * (t + 1), 2) << layer;
      used += room;
    }
    EXPECT_EQ(used, cap.total(t));
  }
}

TEST(KeyCap, WhatALayerLeavesGoesToTheNext) {
  const KeyCap cap({0.25, 0}, shape_of(2, 2), options(4, 1));
  const int64_t all = cap.total(999), half = all - cap.reserved_after(0, 999);
  EXPECT_EQ(half, all / 2);
  EXPECT_EQ(cap.reserved_after(1, 999), 0);
}

TEST(KeyCap, AModelsWindowNeedsNoMoreThanItself) {
  // Equal shares would set 500 keys aside for each layer; the second can read 10.
  const KeyCap cap({0.5, 0}, shape_of(2, 1, {0, 10}), options(4, 1));
  EXPECT_EQ(cap.total(999), 1000);
  EXPECT_EQ(cap.reserved_after(0, 999), 10);
}

TEST(KeyCap, MebibytesAreThoseOfKeysAndValues) {
  cache::Shape shape = shape_of(2, 1);
  shape.head_dim = 64;
  EXPECT_EQ(policies::keys_in(1, shape), 2048);
  EXPECT_EQ(policies::keys_in(0.75, shape), 1536);
  shape.dtype = at::kBFloat16;
  EXPECT_EQ(policies::keys_in(1, shape), 4096);
  EXPECT_EQ(policies::keys_in(256.0 / 1048576, shape), 1);
  EXPECT_THAT(error_of([&] { policies::keys_in(255.0 / 1048576, shape); }), HasSubstr("holds 0"));
}

TEST(KeyCap, RefusesWhatIsNoBudget) {
  const auto of = [](const policies::KeyBudget& budget, const std::vector<float>& shares) {
    return error_of([&] { KeyCap(budget, shape_of(2, 1), options(4, 1), shares); });
  };
  EXPECT_EQ(of({0.5, 0}, {0.5f, 0.5f}), "");
  EXPECT_THAT(of({1.5, 0}, {}), HasSubstr("share 1.5"));
  EXPECT_THAT(of({0, -1}, {}), HasSubstr("-1 keys"));
  EXPECT_THAT(of({0.5, 7}, {}), HasSubstr("one of them"));
  EXPECT_THAT(of({0.5, 0}, {1}), HasSubstr("1 layer shares do not fit 2 layers"));
  EXPECT_THAT(of({0.5, 0}, {0, 0}), HasSubstr("not all 0"));
  EXPECT_THAT(of({0.5, 0}, {2, -1}), HasSubstr("0 or more"));
}

}  // namespace
}  // namespace natslm::test
