// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/key_account.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "natslm/engine/engine.h"
#include "tests/support/plain_policies.h"
#include "tests/support/small_model.h"

namespace natslm::engine {
namespace {

using test::KeepAll;
using testing::Patchwork;
using testing::SmallModel;
using testing::some_tokens;

KeyUse use_of(std::unique_ptr<cache::Policy> policy, int32_t tokens, int32_t chunk) {
  SmallModel model(128);
  Engine engine(model, std::move(policy), nullptr, {.prefill_chunk = chunk});
  return engine.score({.tokens = some_tokens(tokens, 5)}).use;
}

// The definition: readable keys counted one by one.
KeyShares by_hand(int32_t tokens) {
  double end = 0, mean = 0;
  for (int32_t layer = 0; layer < 2; ++layer) {
    for (int32_t head = 0; head < 2; ++head) {
      for (int32_t i = 0; i < tokens; ++i) {
        int32_t readable = 0;
        for (int32_t j = 0; j <= i; ++j) readable += Patchwork::readable(layer, head, i, j);
        const double share = static_cast<double>(readable) / (i + 1);
        mean += share / tokens / 4;
        if (i == tokens - 1) end += share / 4;
      }
    }
  }
  return {end, mean};
}

TEST(KeyAccount, CountsTheKeysEachQueryReadsWhateverTheChunk) {
  for (const int32_t tokens : {2, 17, 64, 101}) {
    const KeyShares want = by_hand(tokens);
    for (const int32_t chunk : {1, 7, 64, 128}) {
      const KeyUse got = use_of(std::make_unique<Patchwork>(), tokens, chunk);
      EXPECT_NEAR(got.kv_end, want.at_end, 1e-12) << tokens << " tokens, chunk " << chunk;
      EXPECT_NEAR(got.kv_mean, want.mean, 1e-12) << tokens << " tokens, chunk " << chunk;
    }
  }
}

TEST(KeyAccount, IsOneWhereNothingIsEvicted) {
  const KeyUse use = use_of(std::make_unique<KeepAll>(), 60, 7);
  EXPECT_DOUBLE_EQ(use.kv_end, 1);
  EXPECT_NEAR(use.kv_mean, 1, 1e-12);
  EXPECT_EQ(use.live_keys, 60 * 2 * 2);
}

// Promises a number of keys that some queries do not keep to.
class Promising final : public Patchwork {
 public:
  int64_t key_cap(int32_t query) const override { return 6 + query / 3; }
  int64_t demoted(int32_t slot) const override { return 40 + slot; }
};

TEST(KeyAccount, TellsByHowMuchAPromisedNumberOfKeysWasPassed) {
  for (const int32_t tokens : {2, 17, 101}) {
    double want = 0;
    for (int32_t i = 0; i < tokens; ++i) {
      int64_t readable = 0;
      for (int32_t list = 0; list < 4; ++list) {
        for (int32_t j = 0; j <= i; ++j) readable += Patchwork::readable(list / 2, list % 2, i, j);
      }
      want = std::max(want, double(readable) / double(6 + i / 3));
    }
    for (const int32_t chunk : {1, 7, 64, 128}) {
      const KeyUse got = use_of(std::make_unique<Promising>(), tokens, chunk);
      EXPECT_DOUBLE_EQ(got.kv_peak_over_cap, want) << tokens << " tokens, chunk " << chunk;
      EXPECT_EQ(got.demoted, 40);
    }
  }
  const KeyUse none = use_of(std::make_unique<Patchwork>(), 30, 7);
  EXPECT_EQ(none.kv_peak_over_cap, 0);
  EXPECT_EQ(none.demoted, 0);
}

TEST(KeyAccount, StartsAnewWithEachSequenceOfASlot) {
  SmallModel model(128);
  Engine engine(model, std::make_unique<Patchwork>(), nullptr, {.max_sequences = 1});
  const KeyUse first = engine.score({.tokens = some_tokens(90, 1)}).use;
  engine.score({.tokens = some_tokens(33, 2)});
  const KeyUse third = engine.score({.tokens = some_tokens(90, 3)}).use;
  EXPECT_EQ(first.kv_end, third.kv_end);
  EXPECT_EQ(first.kv_mean, third.kv_mean);
  EXPECT_EQ(first.kv_bytes_peak, third.kv_bytes_peak);
}

TEST(KeyAccount, WhatAPolicyDecidesAfterAStepCountsFromTheNextQueryOn) {
  // Keeps the two newest keys after each step.
  class TwoNewest : public KeepAll {
    void after_step(int32_t, int32_t, int32_t now, std::span<cache::StoredKeys> stored) override {
      for (cache::StoredKeys& keys : stored) {
        for (size_t i = 0; i < keys.last.size(); ++i) {
          if (keys.position[i] < now - 2) keys.last[i] = now - 1;
        }
      }
    }
  };
  const KeyUse use = use_of(std::make_unique<TwoNewest>(), 40, 1);
  EXPECT_DOUBLE_EQ(use.kv_end, 3.0 / 40);  // two, and the token itself
  EXPECT_EQ(use.live_keys, 2 * 2 * 2);
}

}  // namespace
}  // namespace natslm::engine
