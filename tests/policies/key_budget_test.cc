// Learned roles with a budget, against a simulation of the definition (docs/policies.md): token by
// token, layer by layer, every key looked at every time.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/round.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "natslm/policies/key_cap.h"
#include "natslm/policies/key_ledger.h"
#include "natslm/policies/learned.h"
#include "natslm/policies/policies.h"
#include "tests/cache/cache_streams.h"
#include "tests/support/error_of.h"

namespace natslm::test {
namespace {

using policies::make_policy;
using testing::HasSubstr;

constexpr int32_t kTokens = 90;

// Layers that want different numbers of keys. Logits are sums of few bits, so that they are the
// same whatever the rows of the product they come from, and often equal: ties count too.
Stream uneven_stream(const cache::Shape& shape, int32_t tokens, uint64_t seed) {
  Stream stream = random_stream(shape, tokens, seed);
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    at::Tensor& hidden = stream.hidden[layer];
    hidden = at::round(hidden * 2) / 2;
    hidden.select(1, 0).fill_(1);
    at::Tensor& weight = stream.score_weight[layer];
    weight = at::round(weight * 2) / 2;
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      weight[3 * h + roles::kSliding][0] = 4.0 * ((layer + h) % 3) - 3;
    }
  }
  return stream;
}

using Lifetimes = std::vector<at::Tensor>;  // [layers] of [Hkv, T] int32

struct Simulated {
  Lifetimes last;  // the model's own windows included
  int64_t demoted = 0;
};

// The definition.
Simulated simulate(const Stream& stream, const roles::Options& options, float bias,
                   const policies::KeyCap* cap) {
  const int32_t heads = stream.shape.kv_heads, layers = stream.shape.layers;
  struct Key {
    int32_t last = kForever;
    float certainty = 0;
    bool may_go = false;  // it lives on, and is complete
  };
  std::vector<std::vector<std::vector<Key>>> keys(
      layers, std::vector<std::vector<Key>>(heads, std::vector<Key>(stream.tokens)));
  std::vector<at::Tensor> logits;
  for (int32_t layer = 0; layer < layers; ++layer)
    logits.push_back(at::linear(stream.hidden[layer], stream.score_weight[layer]).contiguous());

  Simulated result;
  for (int32_t t = 0; t < stream.tokens; ++t) {
    int64_t used = 0;
    for (int32_t layer = 0; layer < layers; ++layer) {
      const int32_t window = stream.shape.window(layer);
      const auto reads = [&](int32_t h, int32_t j) {
        return t <= keys[layer][h][j].last && (window == 0 || t < j + window);
      };
      const int32_t first = t / options.chunk * options.chunk;
      for (int32_t h = 0; h < heads && t == first + options.chunk - 1; ++h) {
        float mean[3] = {};
        for (int r = 0; r < 3; ++r) {
          for (int32_t j = first; j <= t; ++j) {
            mean[r] += logits[layer].const_data_ptr<float>()[(j * heads + h) * 3 + r];
          }
          mean[r] /= static_cast<float>(options.chunk);
        }
        int role = 0;
        float best = mean[0];
        if (options.set != roles::RoleSet::kGs && mean[1] > best) best = mean[role = 1];
        if (options.set != roles::RoleSet::kGl && mean[2] + bias > best) role = 2;
        if (first == 0) role = 0;
        for (int32_t j = 0; role == 0 && j < first; ++j) {
          int32_t& last = keys[layer][h][j].last;
          if (last == kOpenEnded) last = t;
        }
        for (int32_t j = first; j <= t; ++j) {
          Key& key = keys[layer][h][j];
          key.last = role == 0 ? kForever : role == 1 ? kOpenEnded : t + options.window;
          key.may_go = role != 2;
          key.certainty = options.set == roles::RoleSet::kGl ? mean[0] - mean[1]
                                                             : mean[role] - (mean[2] + bias);
        }
      }
      int64_t readable = 0;
      for (int32_t h = 0; h < heads; ++h) {
        for (int32_t j = 0; j <= t; ++j) readable += reads(h, j);
      }
      while (cap != nullptr && readable > cap->total(t) - used - cap->reserved_after(layer, t)) {
        std::optional<std::tuple<float, int32_t, int32_t>> least;
        for (int32_t h = 0; h < heads; ++h) {
          for (int32_t j = 1; j <= t; ++j) {
            const Key& key = keys[layer][h][j];
            const int32_t end_of_chunk = j / options.chunk * options.chunk + options.chunk - 1;
            if (!reads(h, j) || !key.may_go || t <= end_of_chunk + options.window) continue;
            const std::tuple this_one(key.certainty, j, h);
            least = std::min(least.value_or(this_one), this_one);
          }
        }
        if (!least) {
          ADD_FAILURE() << "nothing can go at token " << t;
          return result;
        }
        keys[layer][std::get<2>(*least)][std::get<1>(*least)].last = t - 1;
        --readable;
        ++result.demoted;
      }
      used += readable;
    }
  }
  for (int32_t layer = 0; layer < layers; ++layer) {
    result.last.push_back(at::empty({heads, stream.tokens}, at::kInt));
    auto last = result.last.back().accessor<int32_t, 2>();
    const int32_t window = stream.shape.window(layer);
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t j = 0; j < stream.tokens; ++j) {
        last[h][j] = keys[layer][h][j].last;
        if (window > 0) last[h][j] = std::min(last[h][j], j + window - 1);
      }
    }
  }
  return result;
}

// Most keys that any query reads, as a share of what it may: counted here, from the lifetimes.
double peak_over(const Stream& stream, const Lifetimes& last, const policies::KeyCap& floors,
                 double share, int64_t number) {
  double peak = 0;
  for (int32_t t = 0; t < stream.tokens; ++t) {
    int64_t readable = 0, least = 0;
    for (int32_t layer = 0; layer < stream.shape.layers; ++layer) {
      const auto end = last[layer].accessor<int32_t, 2>();
      for (int32_t h = 0; h < stream.shape.kv_heads; ++h) {
        for (int32_t j = 0; j <= t; ++j) readable += visible(t, j, end[h][j]);
      }
      least += floors.floor(layer, t);
    }
    const double keys = double(t + 1) * stream.shape.layers * stream.shape.kv_heads;
    const double allowed = std::max({double(least), share * keys, double(number)});
    peak = std::max(peak, double(readable) / allowed);
  }
  return peak;
}

std::string spec_of(const std::string& budget) {
  return budget.empty() ? "learned" : "learned:" + budget;
}

class KeyBudget : public testing::TestWithParam<std::tuple<roles::RoleSet, int32_t, bool>> {
 protected:
  void SetUp() override {
    const auto [set, chunk, windows] = GetParam();
    context_.roles = {set, 8, chunk};
    context_.shape = {3, 4, 2, 16};
    // One wider than the roles' window and one narrower.
    if (windows) context_.shape.windows = {0, 40, 5};
    context_.bias = set == roles::RoleSet::kGl ? 0 : -1;
    calibration_.layer_shares = {0.5f, 0.2f, 0.3f};
    calibration_.bias = {context_.bias};
    calibration_.kv_end = {0.5f};
  }
  policies::PolicyContext context_;
  roles::Calibration calibration_;
};

// Runs the stream in steps of `chunk` tokens and compares what every query read and what lives.
void expect_lifetimes(const Stream& stream, const Simulated& want, const std::string& spec,
                      const policies::PolicyContext& context, int32_t chunk) {
  SCOPED_TRACE(spec + ", chunk " + std::to_string(chunk));
  cache::KvCache cache(context.shape, make_policy(spec, context));
  const int32_t slot = cache.add_sequence();
  const auto out = run(cache, slot, stream, chunk);
  const auto truth = plain(stream, want.last);
  EXPECT_EQ(cache.policy().demoted(slot), want.demoted);
  for (int32_t layer = 0; layer < stream.shape.layers; ++layer) {
    EXPECT_LT(worst_difference(out[layer], truth[layer]), 1e-5);
    for (int32_t h = 0; h < stream.shape.kv_heads; ++h) {
      EXPECT_EQ(cache.live_positions(slot, layer, h), alive(want.last[layer], h, stream.tokens));
    }
  }
}

TEST_P(KeyBudget, IsKeptByTheDefinitionsLifetimesWhateverTheCut) {
  const Stream stream = uneven_stream(context_.shape, kTokens, 11);
  for (const auto& [spec, share, keys] : {std::tuple("learned:budget=0.05", 0.05, 0),
                                          {"learned:budget=0.12", 0.12, 0},
                                          {"learned:budget=0.5", 0.5, 0},
                                          {"learned:keys=90", 0.0, 90}}) {
    for (const bool calibrated : {false, true}) {
      context_.calibration = calibrated ? &calibration_ : nullptr;
      const policies::KeyCap cap({share, keys}, context_.shape, context_.roles,
                                 calibrated ? calibration_.layer_shares : std::vector<float>());
      const Simulated want = simulate(stream, context_.roles, context_.bias, &cap);
      EXPECT_LE(peak_over(stream, want.last, cap, share, keys), 1);
      for (const int32_t chunk : calibrated ? std::vector{9} : std::vector{1, 7, 64, kTokens}) {
        expect_lifetimes(stream, want, spec, context_, chunk);
      }
    }
  }
}

TEST(KeyBudgetOf, RandomShapesRolesAndBudgetsIsKeptByTheDefinitionsLifetimes) {
  std::mt19937 random(3);
  const auto between = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  int64_t demoted = 0;
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    policies::PolicyContext context;
    const int heads = between(1, 3);
    context.shape = {between(1, 4), heads, heads, 8};
    context.roles = {static_cast<roles::RoleSet>(between(1, 3)), between(0, 12),
                     random() % 2 ? 1 : between(2, 6)};
    context.bias = static_cast<float>(between(-6, 2)) / 2;
    if (random() % 2) {
      for (int32_t layer = 0; layer < context.shape.layers; ++layer) {
        context.shape.windows.push_back(random() % 2 ? 0 : between(1, 40));
      }
    }
    const double share = random() % 3 ? between(1, 70) / 100.0 : 0;
    const int64_t keys = share > 0 ? 0 : between(1, 200);
    const std::string spec = share > 0 ? "learned:budget=" + policies::shortest(share)
                                       : "learned:keys=" + std::to_string(keys);
    const Stream stream = uneven_stream(context.shape, between(1, 90), random());
    const policies::KeyCap cap({share, keys}, context.shape, context.roles);
    const Simulated want = simulate(stream, context.roles, context.bias, &cap);
    EXPECT_LE(peak_over(stream, want.last, cap, share, keys), 1);
    expect_lifetimes(stream, want, spec, context, between(1, 40));
    demoted += want.demoted;
    if (HasFailure()) return;
  }
  EXPECT_GT(demoted, 1000);
}

// Tells the lifetimes it was given, by position.
class Recorder : public cache::Policy {
 public:
  Recorder(std::unique_ptr<cache::Policy> inner, Lifetimes* into)
      : inner_(std::move(inner)), into_(into) {}
  std::string spec() const override { return inner_->spec(); }
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override {
    inner_->on_append(fresh, stored);
    auto all = (*into_)[fresh.layer].accessor<int32_t, 2>();
    const auto last = fresh.last.accessor<int32_t, 2>();
    for (int32_t h = 0; h < last.size(0); ++h) {
      for (int32_t i = 0; i < last.size(1); ++i) all[h][fresh.first_position + i] = last[h][i];
      for (size_t j = 0; j < stored[h].last.size(); ++j) {
        all[h][stored[h].position[j]] = stored[h].last[j];
      }
    }
  }

 private:
  std::unique_ptr<cache::Policy> inner_;
  Lifetimes* into_;
};

at::Tensor ends_of_window(int32_t window) {
  return at::arange(kTokens, at::kInt) + (window - 1);
}

TEST_P(KeyBudget, GivesEveryKeyTheSameEndWhateverTheCut) {
  const Stream stream = uneven_stream(context_.shape, kTokens, 12);
  for (const char* budget : {"budget=0.05", "budget=0.5"}) {
    Lifetimes first;
    for (const int32_t chunk : {1, 7, 64}) {
      Lifetimes last;
      for (int32_t layer = 0; layer < 3; ++layer) last.push_back(at::zeros({2, kTokens}, at::kInt));
      cache::KvCache cache(context_.shape, std::make_unique<Recorder>(
                                               make_policy(spec_of(budget), context_), &last));
      run(cache, cache.add_sequence(), stream, chunk);
      for (int32_t layer = 0; layer < 3; ++layer) {
        // The cache writes the ends of the model's windows at its own time.
        const int32_t window = context_.shape.window(layer);
        if (window > 0) last[layer] = at::minimum(last[layer], ends_of_window(window));
      }
      if (first.empty()) first = last;
      for (int32_t layer = 0; layer < 3; ++layer) {
        EXPECT_TRUE(at::equal(last[layer], first[layer])) << budget << ", chunk " << chunk;
      }
    }
  }
}

TEST_P(KeyBudget, AfterEveryTokenTheCacheHoldsNoMore) {
  const Stream stream = uneven_stream(context_.shape, kTokens, 13);
  for (const double share : {0.05, 0.3}) {
    const policies::KeyCap floors({1e-9, 0}, context_.shape, context_.roles);
    cache::KvCache cache(context_.shape,
                         make_policy("learned:budget=" + policies::shortest(share), context_));
    const int32_t slot = cache.add_sequence();
    for (int32_t t = 0; t < kTokens; ++t) {
      step(cache, {slot}, {&stream}, {t}, {1});
      // What the next query will find besides its own key; this one read no more than it may, too.
      ASSERT_LE(cache.usage(slot).live_keys,
                std::max(double(floors.total(t)), share * (t + 1) * 3 * 2));
      for (int32_t list = 0; list < 6; ++list) {
        if (context_.shape.window(list / 2) > 0) continue;
        ASSERT_EQ(cache.live_positions(slot, list / 2, list % 2).front(), 0);  // token 0 stays
      }
    }
  }
}

TEST_P(KeyBudget, ThatIsLargeEnoughChangesNoBit) {
  const Stream stream = uneven_stream(context_.shape, kTokens, 14);
  for (const int32_t chunk : {1, 64}) {
    cache::KvCache free(context_.shape, make_policy("learned", context_));
    const int32_t slot = free.add_sequence();
    const auto want = run(free, slot, stream, chunk);
    for (const char* budget : {"budget=1", "keys=1000000"}) {
      cache::KvCache cache(context_.shape, make_policy(spec_of(budget), context_));
      ASSERT_EQ(cache.add_sequence(), slot);
      const auto got = run(cache, slot, stream, chunk);
      for (int32_t layer = 0; layer < 3; ++layer) EXPECT_TRUE(at::equal(got[layer], want[layer]));
      EXPECT_EQ(cache.live_per_head(slot), free.live_per_head(slot));
      EXPECT_EQ(cache.policy().demoted(slot), 0);
    }
  }
}

using Param = std::tuple<roles::RoleSet, int32_t, bool>;

std::string name_of(const testing::TestParamInfo<Param>& info) {
  return std::string(roles::name(std::get<0>(info.param))) + "_chunk" +
         std::to_string(std::get<1>(info.param)) +
         (std::get<2>(info.param) ? "_model_windows" : "");
}

INSTANTIATE_TEST_SUITE_P(Roles, KeyBudget,
                         testing::Combine(testing::Values(roles::RoleSet::kGls, roles::RoleSet::kGs,
                                                          roles::RoleSet::kGl),
                                          testing::Values(1, 4), testing::Bool()),
                         name_of);

// One layer, one head, W = 1; each token's logits are given.
std::vector<int32_t> live_with(const std::vector<std::array<float, 3>>& logits,
                               const std::string& spec) {
  const cache::Shape shape{1, 1, 1, 8};
  Stream stream = random_stream(shape, static_cast<int32_t>(logits.size()), 1);
  stream.hidden[0] = at::zeros({stream.tokens, 3}, at::kFloat);
  stream.score_weight[0] = at::zeros({3, 3}, at::kFloat);
  for (int r = 0; r < 3; ++r) {
    stream.score_weight[0][r][r] = 1;
    for (int32_t t = 0; t < stream.tokens; ++t) stream.hidden[0][t][r] = logits[t][r];
  }
  cache::KvCache cache(shape, make_policy(spec, {shape, {roles::RoleSet::kGls, 1, 1}}));
  const int32_t slot = cache.add_sequence();
  run(cache, slot, stream, 3);
  return cache.live_positions(slot, 0, 0);
}

TEST(Demotion, TakesTheLeastCertainFirst) {
  // Token 0 would be Sliding, were it not the first; 1, 2 and 4 are Global by 3, 1 and 2.
  const std::vector<std::array<float, 3>> logits{{0, 0, 9}, {3, 0, 0}, {1, 0, 0}, {0, 0, 5},
                                                 {2, 0, 0}, {0, 0, 5}, {0, 0, 5}, {0, 0, 5}};
  EXPECT_EQ(live_with(logits, "learned"), (std::vector<int32_t>{0, 1, 2, 4, 7}));
  // The last query reads 0, 6, 7 whatever the budget; there is room for none, one, two more.
  EXPECT_EQ(live_with(logits, "learned:keys=1"), (std::vector<int32_t>{0, 7}));
  EXPECT_EQ(live_with(logits, "learned:keys=4"), (std::vector<int32_t>{0, 1, 7}));
  EXPECT_EQ(live_with(logits, "learned:keys=5"), (std::vector<int32_t>{0, 1, 4, 7}));
  EXPECT_EQ(live_with(logits, "learned:keys=6"), (std::vector<int32_t>{0, 1, 2, 4, 7}));
}

TEST(Demotion, OfEquallyCertainKeysTheOlderGoes) {
  const std::vector<std::array<float, 3>> logits{{0, 0, 9}, {2, 0, 0}, {2, 0, 0},
                                                 {2, 0, 0}, {0, 0, 5}, {0, 0, 5}};
  EXPECT_EQ(live_with(logits, "learned:keys=5"), (std::vector<int32_t>{0, 2, 3, 5}));
}

TEST(Demotion, ALogitThatIsNotANumberCountsAsCertain) {
  const std::vector<std::array<float, 3>> logits{{0, 0, 9}, {9, 0, 0}, {1, 0, NAN},
                                                 {8, 0, 0}, {0, 0, 5}, {0, 0, 5}};
  EXPECT_EQ(live_with(logits, "learned:keys=4"), (std::vector<int32_t>{0, 2, 5}));
}

TEST(Demotion, IsCountedPerSequenceAndForgottenWithIt) {
  const cache::Shape shape{3, 4, 2, 16};
  const policies::PolicyContext context{shape, {roles::RoleSet::kGls, 8, 1}, -1, kTokens};
  const Stream stream = uneven_stream(shape, kTokens, 15);
  Stream other = uneven_stream(shape, kTokens, 16);
  other.score_weight = stream.score_weight;
  const auto make = [&] { return make_policy("learned:budget=0.12", context); };
  cache::KvCache alone(shape, make());
  const int32_t lone = alone.add_sequence();
  const auto want = run(alone, lone, stream, 20);
  ASSERT_GT(alone.policy().demoted(lone), 20);

  cache::KvCache shared(shape, make());
  const int32_t used = shared.add_sequence();
  run(shared, used, other, 33);
  shared.remove_sequence(used);
  EXPECT_EQ(shared.policy().demoted(used), 0);
  const int32_t slot = shared.add_sequence(), neighbour = shared.add_sequence();
  for (int32_t begin = 0; begin < kTokens; begin += 30) {
    step(shared, {neighbour, slot}, {&other, &stream}, {begin, begin}, {30, 30});
  }
  EXPECT_EQ(shared.policy().demoted(slot), alone.policy().demoted(lone));
  EXPECT_NE(shared.policy().demoted(neighbour), alone.policy().demoted(lone));
  EXPECT_EQ(shared.live_per_head(slot), alone.live_per_head(lone));
}

TEST(Demotion, TheLedgerRemembersNoMoreThanLiveAndWindowKeys) {
  constexpr int32_t kHeads = 2, kWindow = 16, kLong = 20000;
  std::mt19937 random(1);
  policies::KeyLedger ledger(kHeads, {roles::RoleSet::kGls, kWindow, 1}, 0);
  std::vector<std::vector<int32_t>> open(kHeads);
  int64_t most = 0;
  for (int32_t t = 0; t < kLong; ++t) {
    ledger.arrive(t);
    for (int32_t h = 0; h < kHeads; ++h) {
      const auto certainty = static_cast<float>(random() % 1000);
      // Many Locals, and a Global now and then that ends them all.
      const int draw = t == 0 ? 0 : static_cast<int>(random() % 400);
      if (draw == 0) {
        for (const int32_t position : open[h]) ledger.end_open(position);
        open[h].clear();
      }
      if (draw <= 200) {
        ledger.keep(h, t, certainty, draw > 0);
        if (draw > 0) open[h].push_back(t);
      } else {
        ledger.slide(t);
      }
    }
    most = std::max(most, ledger.readable());
    ASSERT_LE(ledger.entries(), 4 * (ledger.readable() + kHeads * kWindow) + 400) << t;
  }
  EXPECT_GT(most, 1000);
}

TEST(Budget, TakesItsBiasFromTheCalibrationUnlessTheSpecGivesOne) {
  policies::PolicyContext context{{2, 4, 2, 16}, {roles::RoleSet::kGls, 8, 1}, 0.5f, 100};
  const roles::Calibration table{{-2, 2}, {0.5f, 0.1f}, {}};
  const auto of = [&](const char* spec) { return make_policy(spec, context)->spec(); };
  EXPECT_EQ(of("learned:budget=0.3"), "learned:bias=0.5,budget=0.3");
  context.calibration = &table;
  EXPECT_EQ(of("learned"), "learned:bias=0.5");
  EXPECT_EQ(of("learned:budget=0.05"), "learned:bias=2,budget=0.05");
  EXPECT_THAT(of("learned:budget=0.3"), testing::StartsWith("learned:bias="));
  EXPECT_NEAR(policies::Spec(of("learned:budget=0.3")).number("bias", 9, -9, 9), 0, 1e-6);
  EXPECT_EQ(of("learned:budget=0.3,bias=1"), "learned:bias=1,budget=0.3");
  // 200 of 100 tokens' 400 keys: half of them.
  EXPECT_EQ(of("learned:keys=200"), "learned:bias=-2,keys=200");
}

TEST(Budget, SaysWhatIsWrongWithIt) {
  const policies::PolicyContext context{{2, 4, 2, 16}, {roles::RoleSet::kGls, 8, 1}};
  const auto of = [&](const char* spec) { return error_of([&] { make_policy(spec, context); }); };
  EXPECT_EQ(of("learned:budget=1.5"), "policy learned: budget=1.5 is not a number from 0 to 1");
  EXPECT_THAT(of("learned:keys=-3"), HasSubstr("keys=-3 is not a whole number from 0"));
  EXPECT_THAT(of("learned:keys=3,budget=0.1"), HasSubstr("give one of them"));
}

}  // namespace
}  // namespace natslm::test
