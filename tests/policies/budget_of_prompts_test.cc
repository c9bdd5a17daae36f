// Budgets through the engine: what users are told is never passed.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "natslm/engine/engine.h"
#include "natslm/policies/policies.h"
#include "tests/support/small_model.h"

namespace natslm::policies {
namespace {

using testing::SmallModel;
using testing::some_tokens;

TEST(Budget, IsNeverPassedOn100VariedPrompts) {
  std::mt19937 random(7);
  SmallModel model(512);
  const auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  int64_t demoted = 0;
  for (int round = 0; round < 100; ++round) {
    PolicyContext context;
    context.shape = model.cache_shape(at::kFloat);
    context.roles = {round % 3 ? roles::RoleSet::kGls : roles::RoleSet::kGs, between(0, 24),
                     round % 4 ? 1 : between(2, 5)};
    context.bias = static_cast<float>(between(-40, 20)) / 10;
    const double share = between(1, 60) / 100.0;
    const int32_t tokens = between(2, 300);
    const std::string spec = "learned:budget=" + shortest(share);
    SCOPED_TRACE(spec + ", " + std::to_string(tokens) + " tokens, round " + std::to_string(round));
    engine::Engine engine(model, make_policy(spec, context), nullptr,
                          {.prefill_chunk = between(1, 80)});
    const auto use = engine.score({.tokens = some_tokens(tokens, random())}).use;
    EXPECT_LE(use.kv_peak_over_cap, 1);
    EXPECT_GT(use.kv_peak_over_cap, 0);
    // The share at the end, by the floor's own definition.
    const int32_t floor = context.roles.window + context.roles.chunk + 1;
    EXPECT_LE(use.kv_end, std::max(share, double(floor) / tokens) + 1e-12);
    demoted += use.demoted;
  }
  EXPECT_GT(demoted, 5000);
}

TEST(Budget, OfKeysBoundsTheKeysOfAnyLength) {
  SmallModel model(512);
  PolicyContext context;
  context.shape = model.cache_shape(at::kFloat);
  context.roles = {roles::RoleSet::kGls, 8, 1};
  context.bias = -5;
  for (const int32_t tokens : {40, 400}) {
    engine::Engine engine(model, make_policy("learned:keys=120", context));
    const auto use = engine.score({.tokens = some_tokens(tokens, 3)}).use;
    EXPECT_LE(use.kv_end * tokens * 4, 120 + 1e-9);
    EXPECT_LE(use.kv_peak_over_cap, 1);
    if (tokens == 400) {
      EXPECT_GT(use.kv_end * tokens * 4, 100);  // it is used, too
    }
  }
}

}  // namespace
}  // namespace natslm::policies
