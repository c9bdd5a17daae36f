// Each policy against a simulation of its definition, token by token, in double precision.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/policies.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/item.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/max.h>
#include <ATen/ops/min.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/policies/learned.h"
#include "natslm/roles/lifetimes.h"
#include "tests/cache/cache_streams.h"
#include "tests/support/error_of.h"

namespace natslm::test {
namespace {

using policies::make_policy;
using policies::with_budget;
using testing::HasSubstr;

constexpr int32_t kTokens = 150;
const cache::Shape kShape{2, 4, 2, 16};

policies::PolicyContext context() {
  return {kShape, {roles::RoleSet::kGls, 8, 1}, 0, kTokens, 3};
}

at::Tensor rows_of(const at::Tensor& x, const std::vector<int32_t>& rows) {
  std::vector<at::Tensor> parts;
  for (const int32_t row : rows) parts.push_back(x[row]);
  return at::stack(parts);
}

// One query [D] over the keys and values [n, D]: its output and the probabilities.
std::pair<at::Tensor, at::Tensor> attend_one(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, double scale) {
  const at::Tensor p =
      at::softmax(at::einsum("d,nd->n", {q.to(at::kDouble), k.to(at::kDouble)}) * scale, 0);
  return {at::einsum("n,nd->d", {p, v.to(at::kDouble)}).to(at::kFloat), p};
}

TEST(Streaming, EqualsStreamingLlmTokenByToken) {
  constexpr int32_t kSinks = 3, kWindow = 10;
  Stream stream = random_stream(kShape, kTokens, 1);
  stream.rotate = [](const at::Tensor& x, const at::Tensor& positions) {
    // However long the text: a table of angles as long as the cache is enough.
    EXPECT_LT(positions.max().item<int32_t>(), kSinks + kWindow);
    EXPECT_GE(positions.min().item<int32_t>(), 0);
    return rotate_half(x, positions);
  };
  for (const int32_t chunk : {1, 7, kTokens}) {
    cache::KvCache cache(kShape, make_policy("streaming:sinks=3,window=10", context()));
    const int32_t slot = cache.add_sequence();
    const auto out = run(cache, slot, stream, chunk);
    for (int32_t layer = 0; layer < kShape.layers; ++layer) {
      std::vector<int32_t> held;  // positions, as StreamingLLM's cache holds them
      for (int32_t i = 0; i < kTokens; ++i) {
        // Evict before appending, from the sinks onward, so that sinks + window is never exceeded.
        while (std::ssize(held) + 1 > kSinks + kWindow) held.erase(held.begin() + kSinks);
        held.push_back(i);
        const int64_t n = std::ssize(held);
        // Keys are rotated to their place in the cache, the query to the last place.
        const at::Tensor place = at::arange(n, at::kInt);
        const at::Tensor k = rotate_half(rows_of(stream.k[layer], held), place);
        const at::Tensor v = rows_of(stream.v[layer], held);
        const at::Tensor q =
            rotate_half(stream.q[layer].narrow(0, i, 1), at::full({1}, n - 1, at::kInt))[0];
        for (int32_t h = 0; h < kShape.q_heads; ++h) {
          const int32_t kv = h / 2;
          const auto truth = attend_one(q[h], k.select(1, kv), v.select(1, kv), stream.scale).first;
          ASSERT_LT(worst_difference(out[layer][i][h], truth), 1e-5)
              << "chunk " << chunk << ", layer " << layer << ", token " << i;
        }
      }
    }
    // What the next query will find: the sinks and the last window - 1 keys besides its own.
    EXPECT_EQ(cache.live_positions(slot, 1, 1),
              (std::vector<int32_t>{0, 1, 2, 141, 142, 143, 144, 145, 146, 147, 148, 149}));
  }
}

TEST(StreamingOriginal, EqualsSinksAndAWindowAtTheirPositions) {
  const Stream stream = random_stream(kShape, kTokens, 2);
  at::Tensor last = at::arange(kTokens, at::kInt) + 9;
  last.narrow(0, 0, 3).fill_(kForever);
  const at::Tensor both = at::stack({last, last});
  const auto truth = plain(stream, {both, both});
  for (const int32_t chunk : {1, 7, kTokens}) {
    cache::KvCache cache(kShape, make_policy("streaming-original:sinks=3,window=10", context()));
    const auto out = run(cache, cache.add_sequence(), stream, chunk);
    for (int32_t layer = 0; layer < kShape.layers; ++layer) {
      EXPECT_LT(worst_difference(out[layer], truth[layer]), 1e-5);
    }
  }
}

// Per KV head: a list of (position, sum of received probability).
TEST(H2o, EqualsTheHeavyHitterOracleStepByStep) {
  constexpr int32_t kHeavy = 6, kRecent = 9;
  const Stream stream = random_stream(kShape, kTokens, 3);
  for (const int32_t chunk : {1, 5}) {
    const std::string spec = "h2o:heavy=6,recent=9,chunk=" + std::to_string(chunk);
    cache::KvCache cache(kShape, make_policy(spec, context()));
    const int32_t slot = cache.add_sequence();
    const auto out = run(cache, slot, stream, chunk);
    const at::Tensor position = at::arange(kTokens, at::kInt);
    for (int32_t layer = 0; layer < kShape.layers; ++layer) {
      const at::Tensor q = rotate_half(stream.q[layer], position);
      const at::Tensor k = rotate_half(stream.k[layer], position);
      for (int32_t kv = 0; kv < kShape.kv_heads; ++kv) {
        std::vector<int32_t> held;
        std::vector<double> sum(kTokens, 0);
        for (int32_t begin = 0; begin < kTokens; begin += chunk) {
          const int32_t end = std::min(begin + chunk, kTokens);
          for (int32_t i = begin; i < end; ++i) {
            held.push_back(i);
            for (int32_t h = 2 * kv; h < 2 * kv + 2; ++h) {
              const auto [truth, p] =
                  attend_one(q[i][h], rows_of(k, held).select(1, kv),
                             rows_of(stream.v[layer], held).select(1, kv), stream.scale);
              ASSERT_LT(worst_difference(out[layer][i][h], truth), 1e-5) << "token " << i;
              for (size_t j = 0; j < held.size(); ++j) sum[held[j]] += p[j].item<double>();
            }
          }
          if (std::ssize(held) <= kHeavy + kRecent) continue;
          std::vector<int32_t> old(held.begin(), held.end() - kRecent);
          std::ranges::sort(old, std::greater(), [&](int32_t j) { return sum[j]; });
          old.resize(kHeavy);
          std::ranges::sort(old);
          held.erase(held.begin(), held.end() - kRecent);
          held.insert(held.begin(), old.begin(), old.end());
        }
        EXPECT_EQ(cache.live_positions(slot, layer, kv), held) << spec;
      }
    }
  }
}

TEST(H2o, TakesSharesOfTheContextOrCounts) {
  EXPECT_EQ(make_policy("h2o", context())->spec(), "h2o:heavy=15,recent=15,chunk=16");
  EXPECT_EQ(make_policy("h2o:heavy=0.5,recent=1,chunk=0", context())->spec(),
            "h2o:heavy=75,recent=1,chunk=0");
  policies::PolicyContext unknown = context();
  unknown.context = 0;
  EXPECT_THROW(make_policy("h2o", unknown), Error);
  EXPECT_NO_THROW(make_policy("h2o:heavy=4,recent=4", unknown));
}

// The roles that the score layer gives, chunk by chunk: [Hkv][complete chunks].
std::vector<std::vector<int8_t>> roles_of(const Stream& stream, int32_t layer,
                                          const roles::Options& options, float bias) {
  const at::Tensor logits = at::linear(stream.hidden[layer], stream.score_weight[layer]);
  std::vector<std::vector<int8_t>> all(stream.shape.kv_heads);
  for (int32_t h = 0; h < stream.shape.kv_heads; ++h) {
    for (int32_t chunk = 0; (chunk + 1) * options.chunk <= stream.tokens; ++chunk) {
      const at::Tensor mean =
          logits.narrow(0, chunk * options.chunk, options.chunk).narrow(1, 3 * h, 3).mean(0);
      const float scores[] = {mean[0].item<float>(), mean[1].item<float>(),
                              mean[2].item<float>() + bias};
      int8_t best = 0;
      for (const int8_t role : {roles::kLocal, roles::kSliding}) {
        if (roles::allows(options.set, roles::Role(role)) && scores[role] > scores[best])
          best = role;
      }
      all[h].push_back(chunk == 0 ? int8_t{roles::kGlobal} : best);
    }
  }
  return all;
}

TEST(Learned, GivesTheLifetimesOfTheModelsRoles) {
  const Stream stream = random_stream(kShape, kTokens, 4);
  for (const roles::RoleSet set :
       {roles::RoleSet::kGls, roles::RoleSet::kGs, roles::RoleSet::kGl}) {
    for (const int32_t role_chunk : {1, 4}) {
      for (const float bias : {1.0f}) {
        policies::PolicyContext with = context();
        with.roles = {set, 8, role_chunk};
        with.bias = bias;
        std::vector<at::Tensor> last;
        for (int32_t layer = 0; layer < kShape.layers; ++layer) {
          last.push_back(at::empty({kShape.kv_heads, kTokens}, at::kInt));
          const auto roles = roles_of(stream, layer, with.roles, bias);
          for (int32_t h = 0; h < kShape.kv_heads; ++h) {
            int32_t* row = last.back().mutable_data_ptr<int32_t>() + int64_t{h} * kTokens;
            roles::write_lifetimes(roles[h], kTokens, with.roles, {{row, size_t{kTokens}}, {}});
          }
        }
        const auto truth = plain(stream, last);
        for (const int32_t chunk : {1, 7, kTokens}) {
          SCOPED_TRACE(std::string(roles::name(set)) + ", role chunk " +
                       std::to_string(role_chunk) + ", bias " + std::to_string(bias) + ", chunk " +
                       std::to_string(chunk));
          cache::KvCache cache(kShape, make_policy("learned", with));
          const int32_t slot = cache.add_sequence();
          const auto out = run(cache, slot, stream, chunk);
          for (int32_t layer = 0; layer < kShape.layers; ++layer) {
            EXPECT_LT(worst_difference(out[layer], truth[layer]), 1e-5);
            for (int32_t h = 0; h < kShape.kv_heads; ++h) {
              EXPECT_EQ(cache.live_positions(slot, layer, h), alive(last[layer], h, kTokens));
            }
          }
        }
      }
    }
  }
}

TEST(Learned, RemembersRolesForDisplayIfAsked) {
  const Stream stream = random_stream(kShape, kTokens, 5);
  policies::PolicyContext with = context();
  with.roles.chunk = 4;
  with.record_roles = true;
  cache::KvCache cache(kShape, make_policy("learned", with));
  const int32_t slot = cache.add_sequence();
  run(cache, slot, stream, 7);
  const auto& learned = dynamic_cast<const policies::Learned&>(cache.policy());
  for (int32_t layer = 0; layer < kShape.layers; ++layer) {
    const auto chunks = roles_of(stream, layer, with.roles, 0);
    for (int32_t h = 0; h < kShape.kv_heads; ++h) {
      const auto roles = learned.role_of(slot, layer, h);
      ASSERT_EQ(std::ssize(roles), kTokens);
      for (int32_t j = 0; j < kTokens; ++j) {
        // 150 tokens are 37 chunks of four and two tokens that are not decided yet.
        EXPECT_EQ(roles[j], j < 148 ? chunks[h][j / 4] : policies::Learned::kUndecided) << j;
      }
    }
  }
  cache.remove_sequence(slot);
  EXPECT_TRUE(learned.role_of(slot, 0, 0).empty());
}

TEST(Learned, HoldsLittleMoreThanItsLiveKeysAfterEveryStepOf16kTokens) {
  constexpr int32_t kPrompt = 16384, kLong = kPrompt + 100;
  const cache::Shape shape{1, 3, 3, 8};
  const Stream stream = random_stream(shape, kLong, 10);
  policies::PolicyContext with{shape, {roles::RoleSet::kGls, 64, 1}, 5, kLong, 3};
  cache::KvCache cache(shape, make_policy("learned", with));
  const int32_t slot = cache.add_sequence();
  const int64_t two_pages_a_head = 3 * 2 * kernels::page_bytes(shape.head_dim, DType::kFloat32);
  for (int32_t begin = 0; begin < kLong;) {
    const int32_t size = begin < kPrompt ? 128 : 1;
    step(cache, {slot}, {&stream}, {begin}, {size});
    begin += size;
    const cache::Usage usage = cache.usage();
    ASSERT_LE(usage.held_bytes, 1.03 * usage.live_bytes + two_pages_a_head) << "after " << begin;
  }
  const cache::Usage usage = cache.usage();
  RecordProperty("held_over_live", std::to_string(double(usage.held_bytes) / usage.live_bytes));
  RecordProperty("live_share", std::to_string(usage.live_keys / (3.0 * kLong)));
  EXPECT_LT(usage.live_keys, 3 * kLong / 3);
}

TEST(Learned, KeepsMoreWithALowerBias) {
  const Stream stream = random_stream(kShape, kTokens, 6);
  int64_t before = -1;
  for (const char* spec : {"learned:bias=-3", "learned", "learned:bias=3"}) {
    cache::KvCache cache(kShape, make_policy(spec, context()));
    run(cache, cache.add_sequence(), stream, 20);
    if (before >= 0) {
      EXPECT_LT(cache.usage().live_keys, before) << spec;
    }
    before = cache.usage().live_keys;
  }
}

TEST(Random, KeepsTheShareItPromisesAndDrawsByPositionAlone) {
  constexpr int32_t kLong = 4000;
  const cache::Shape shape{1, 2, 2, 8};
  const Stream stream = random_stream(shape, kLong, 7);
  std::vector<int32_t> first;
  for (const int32_t chunk : {97, kLong}) {
    cache::KvCache cache(shape, make_policy("random:keep=0.2,sinks=2,window=50", context()));
    cache.add_sequence();
    const int32_t slot = cache.add_sequence();  // not the first one
    run(cache, slot, stream, chunk);
    const auto live = cache.live_positions(slot, 0, 0);
    EXPECT_NEAR(double(live.size()) / kLong, 0.2 + 52.0 / kLong, 0.02);
    EXPECT_NE(live, cache.live_positions(slot, 0, 1));  // heads draw apart
    if (first.empty()) first = live;
    EXPECT_EQ(live, first);
  }
  policies::PolicyContext other = context();
  other.seed = 4;
  cache::KvCache cache(shape, make_policy("random:keep=0.2,sinks=2,window=50", other));
  const int32_t slot = cache.add_sequence();
  run(cache, slot, stream, kLong);
  EXPECT_NE(cache.live_positions(slot, 0, 0), first);
}

TEST(WithBudget, GivesEveryPolicyThatManyKeys) {
  constexpr int32_t kLong = 1000;
  const cache::Shape shape{2, 2, 2, 8};
  const Stream stream = random_stream(shape, kLong, 8);
  for (const char* name : {"streaming", "streaming-original", "h2o", "random"}) {
    for (const double share : {0.05, 0.25}) {
      const std::string spec = with_budget(name, share, kLong);
      policies::PolicyContext with = context();
      with.context = kLong;
      cache::KvCache cache(shape, make_policy(spec, with));
      const int32_t slot = cache.add_sequence();
      const int32_t limit = cache.policy().chunk_limit();
      run(cache, slot, stream, limit > 0 ? limit : kLong);
      double live = 0;
      for (const auto& layer : cache.live_per_head(slot)) {
        for (const int32_t keys : layer) live += keys / 4.0;
      }
      const double budget = share * kLong;
      // The query's own key still counts for a window; the random one is right on average.
      EXPECT_NEAR(live, budget, std::string(name) == "random" ? 4 * std::sqrt(budget) / 2 : 1.5)
          << spec;
    }
  }
  EXPECT_EQ(with_budget("streaming", 0.25, 512), "streaming:sinks=4,window=124");
  EXPECT_EQ(with_budget("streaming:sinks=2", 0.25, 512), "streaming:sinks=2,window=126");
  EXPECT_EQ(with_budget("h2o:chunk=1", 0.1, 510), "h2o:chunk=1,heavy=25,recent=26");
}

TEST(Specs, SayWhatIsWrongAndWhatIsAllowed) {
  const auto of = [](const char* spec) { return error_of([&] { make_policy(spec, context()); }); };
  EXPECT_EQ(of("snap"),
            "unknown policy \"snap\"; known are full, learned, streaming, streaming-original, "
            "h2o, random");
  EXPECT_EQ(of("streaming:sink=4"), "policy streaming has no option sink; it has sinks, window");
  EXPECT_EQ(of("full:x=1"), "policy full has no options; got x");
  EXPECT_EQ(of("streaming:window=0"),
            "policy streaming: window=0 is not a whole number from 1 to 2147483645");
  EXPECT_EQ(of("random:keep=1.5"), "policy random: keep=1.5 is not a number from 0 to 1");
  EXPECT_THAT(of("random:keep=nan"), HasSubstr("is not a number"));
  EXPECT_THAT(of("random:keep=0.1x"), HasSubstr("is not a number"));
  EXPECT_THAT(of("streaming:window=2.5"), HasSubstr("is not a whole number"));
  EXPECT_THAT(of(""), HasSubstr("has no name"));
  EXPECT_THAT(of(":a=1"), HasSubstr("has no name"));
  EXPECT_THAT(of("streaming:"), HasSubstr("is not option=value"));
  EXPECT_THAT(of("streaming:sinks"), HasSubstr("is not option=value"));
  EXPECT_THAT(of("streaming:sinks="), HasSubstr("is not option=value"));
  EXPECT_THAT(of("streaming:sinks=1,sinks=2"), HasSubstr("twice"));
  EXPECT_THAT(error_of([] {
                policies::PolicyContext dense = context();
                dense.roles.set = roles::RoleSet::kDense;
                make_policy("learned", dense);
              }),
              HasSubstr("trained without roles"));
  EXPECT_THAT(error_of([] { with_budget("full", 0.1, 100); }), HasSubstr("has no key budget"));
  EXPECT_THAT(error_of([] { with_budget("streaming", 0.01, 100); }), HasSubstr("raise the budget"));
  EXPECT_THAT(error_of([] { with_budget("streaming", 1.5, 100); }), HasSubstr("(0, 1]"));
}

TEST(Learned, SaysThatAModelWithoutScoreLayerNeedsAnotherPolicy) {
  Stream stream = random_stream(kShape, 5, 9);
  for (at::Tensor& weight : stream.score_weight) weight = at::Tensor();
  cache::KvCache cache(kShape, make_policy("learned", context()));
  const int32_t slot = cache.add_sequence();
  EXPECT_THAT(error_of([&] { run(cache, slot, stream, 5); }), HasSubstr("no score layer"));
}

}  // namespace
}  // namespace natslm::test
