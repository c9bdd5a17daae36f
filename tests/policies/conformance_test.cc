// What holds for every policy of the table, the ones to come included.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "natslm/kernels/attention_decode.h"
#include "natslm/policies/policies.h"
#include "tests/cache/cache_streams.h"

namespace natslm::test {
namespace {

constexpr int32_t kTokens = 150;
const cache::Shape kShape{2, 4, 2, 16};

policies::PolicyContext context() {
  return {kShape, {roles::RoleSet::kGls, 8, 1}, 0, kTokens, 3};
}

class EveryPolicy : public testing::TestWithParam<policies::Entry> {
 protected:
  std::unique_ptr<cache::Policy> make() const {
    return policies::make_policy(GetParam().name, context());
  }
};

TEST_P(EveryPolicy, GivesTheSameOutputsAndTheSameLiveKeysForEveryChunk) {
  if (make()->chunk_limit() > 0) GTEST_SKIP() << "the chunk is part of this policy's definition";
  const Stream stream = random_stream(kShape, kTokens, 1);
  std::vector<at::Tensor> first;
  std::vector<std::vector<int32_t>> first_live;
  for (const int32_t chunk : {1, 7, 64, kTokens}) {
    cache::KvCache cache(kShape, make());
    const int32_t slot = cache.add_sequence();
    const auto out = run(cache, slot, stream, chunk);
    std::vector<std::vector<int32_t>> live;
    for (int32_t list = 0; list < 4; ++list) {
      live.push_back(cache.live_positions(slot, list / 2, list % 2));
    }
    if (first.empty()) {
      first = out;
      first_live = live;
    }
    EXPECT_EQ(live, first_live) << "chunk " << chunk;
    for (int layer = 0; layer < kShape.layers; ++layer) {
      EXPECT_LT(worst_difference(out[layer], first[layer]), 1e-4) << "chunk " << chunk;
    }
  }
}

TEST_P(EveryPolicy, HoldsNoMoreThanItsLiveKeysAndAPageAHead) {
  const Stream stream = random_stream(kShape, 400, 2);
  cache::KvCache cache(kShape, make());
  const int32_t slot = cache.add_sequence();
  const int32_t limit = cache.policy().chunk_limit();
  for (int32_t begin = 0; begin < 400;) {
    const int32_t size = std::min({400 - begin, limit > 0 ? limit : 64, begin < 200 ? 64 : 1});
    step(cache, {slot}, {&stream}, {begin}, {size});
    begin += size;
    const cache::Usage usage = cache.usage();
    ASSERT_LE(usage.held_bytes,
              usage.live_bytes + 4 * kernels::page_bytes(kShape.head_dim, DType::kFloat32));
    ASSERT_LE(usage.live_keys, 4 * begin);
  }
}

TEST_P(EveryPolicy, TreatsASequenceTheSameInAnyCompanyAndInAUsedSlot) {
  const Stream stream = random_stream(kShape, 60, 3);
  Stream other = random_stream(kShape, 60, 4);
  other.score_weight = stream.score_weight;
  const int32_t limit = make()->chunk_limit() > 0 ? make()->chunk_limit() : 20;
  cache::KvCache alone(kShape, make()), shared(kShape, make());
  const int32_t lone = alone.add_sequence();
  const auto expected = run(alone, lone, stream, limit);
  const int32_t used = shared.add_sequence();
  run(shared, used, other, limit);
  shared.remove_sequence(used);
  const int32_t slot = shared.add_sequence(), neighbour = shared.add_sequence();
  for (int32_t begin = 0; begin < 60;) {
    const int32_t size = std::min(limit, 60 - begin);
    const auto out =
        step(shared, {neighbour, slot}, {&other, &stream}, {begin, begin}, {size, size});
    for (int layer = 0; layer < kShape.layers; ++layer) {
      EXPECT_LT(worst_difference(out[1][layer], expected[layer].narrow(0, begin, size)), 1e-5);
    }
    begin += size;
  }
  for (int32_t list = 0; list < 4; ++list) {
    EXPECT_EQ(shared.live_positions(slot, list / 2, list % 2),
              alone.live_positions(lone, list / 2, list % 2));
  }
}

TEST_P(EveryPolicy, ReadsWhatItWrites) {
  const std::string spec = make()->spec();
  EXPECT_EQ(spec.substr(0, spec.find(':')), GetParam().name);
  EXPECT_EQ(policies::make_policy(spec, context())->spec(), spec);
}

TEST_P(EveryPolicy, HasTheDefaultsItDocuments) {
  std::string spec(GetParam().name);
  char separator = ':';
  for (const policies::OptionDoc& option : GetParam().options) {
    EXPECT_FALSE(option.summary.empty());
    spec += separator + std::string(option.name) + "=" + std::string(option.fallback);
    separator = ',';
  }
  EXPECT_EQ(policies::make_policy(spec, context())->spec(), make()->spec());
}

INSTANTIATE_TEST_SUITE_P(Table, EveryPolicy,
                         testing::ValuesIn(policies::table().begin(), policies::table().end()),
                         [](const auto& entry) {
                           std::string name(entry.param.name);
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

TEST(PolicyTable, HasUniqueNamesAndSummaries) {
  std::set<std::string_view> names;
  for (const policies::Entry& entry : policies::table()) {
    EXPECT_TRUE(names.insert(entry.name).second) << entry.name;
    EXPECT_FALSE(entry.summary.empty()) << entry.name;
  }
}

}  // namespace
}  // namespace natslm::test
