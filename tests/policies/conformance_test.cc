// Every policy of the table, the ones to come included.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "natslm/policies/policies.h"
#include "tests/cache/cache_streams.h"

namespace natslm::test {
namespace {

constexpr int32_t kTokens = 150;
const cache::Shape kShape{2, 4, 2, 16};

policies::PolicyContext context() {
  return {kShape, {roles::RoleSet::kGls, 8, 1}, 0, kTokens, 3};
}

TEST(EveryPolicy, GivesTheSameOutputsAndLiveKeysForEveryChunk) {
  const Stream stream = random_stream(kShape, kTokens, 1);
  for (const policies::Entry& entry : policies::table()) {
    std::vector<at::Tensor> first;
    std::vector<int32_t> first_live;
    for (const int32_t chunk : {1, 7, 64, kTokens}) {
      cache::KvCache cache(kShape, policies::make_policy(entry.name, context()));
      const int32_t limit = cache.policy().chunk_limit();
      if (limit > 0) continue;  // the chunk is part of its definition
      const int32_t slot = cache.add_sequence();
      const auto out = run(cache, slot, stream, chunk);
      const auto live = cache.live_positions(slot, 1, 1);
      if (first.empty()) {
        first = out;
        first_live = live;
        continue;
      }
      EXPECT_EQ(live, first_live) << entry.name << ", chunk " << chunk;
      for (int layer = 0; layer < kShape.layers; ++layer) {
        EXPECT_LT(worst_difference(out[layer], first[layer]), 1e-4)
            << entry.name << ", chunk " << chunk;
      }
    }
  }
}

}  // namespace
}  // namespace natslm::test
