// The cache against attention that keeps everything, and its account against a simulation key by
// key.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/kv_cache.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "natslm/base/error.h"
#include "natslm/kernels/attention_decode.h"
#include "tests/cache/cache_streams.h"
#include "tests/support/error_of.h"
#include "tests/support/plain_policies.h"

namespace natslm::test {
namespace {

constexpr int32_t kTokens = 150;
const cache::Shape kShape{2, 4, 2, 16};

// Counts what is really allocated.
class CountingMemory : public std::pmr::memory_resource {
 public:
  int64_t bytes = 0, peak = 0;

 private:
  void* do_allocate(size_t size, size_t alignment) override {
    bytes += static_cast<int64_t>(size);
    peak = std::max(peak, bytes);
    return std::pmr::new_delete_resource()->allocate(size, alignment);
  }
  void do_deallocate(void* memory, size_t size, size_t alignment) override {
    bytes -= static_cast<int64_t>(size);
    std::pmr::new_delete_resource()->deallocate(memory, size, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

std::vector<at::Tensor> forever(const cache::Shape& shape, int32_t tokens) {
  return std::vector<at::Tensor>(shape.layers,
                                 at::full({shape.kv_heads, tokens}, kForever, at::kInt));
}

void expect_close(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b,
                  double allowed = 1e-5) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_LT(worst_difference(a[i], b[i]), allowed) << "layer " << i;
}

TEST(KvCache, KeepingEveryKeyEqualsDenseCausalAttention) {
  const Stream stream = random_stream(kShape, kTokens, 1);
  const auto truth = plain(stream, forever(kShape, kTokens));
  for (const int32_t chunk : {1, 7, 64, kTokens}) {
    cache::KvCache cache(kShape, std::make_unique<KeepAll>());
    expect_close(run(cache, cache.add_sequence(), stream, chunk), truth);
  }
}

TEST(KvCache, EvictingDeadKeysChangesNoOutputAndLeavesExactlyTheLiveOnes) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const Stream stream = random_stream(kShape, kTokens, seed);
    const auto last = random_lifetimes(kShape, kTokens, seed);
    const auto truth = plain(stream, last);
    for (const int32_t chunk : {1, 7, 64, kTokens}) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", chunk " + std::to_string(chunk));
      cache::KvCache cache(kShape, std::make_unique<Scripted>(last));
      const int32_t slot = cache.add_sequence();
      expect_close(run(cache, slot, stream, chunk), truth);
      for (int32_t layer = 0; layer < kShape.layers; ++layer) {
        for (int32_t head = 0; head < kShape.kv_heads; ++head) {
          const auto expected = alive(last[layer], head, kTokens);
          EXPECT_EQ(cache.live_positions(slot, layer, head), expected);
          EXPECT_EQ(cache.live_per_head(slot)[layer][head], std::ssize(expected));
        }
      }
    }
  }
}

TEST(KvCache, InBf16IsAsGoodAsItsStorage) {
  cache::Shape shape = kShape;
  shape.dtype = at::kBFloat16;
  const Stream stream = random_stream(shape, kTokens, 4);
  const auto last = random_lifetimes(shape, kTokens, 4);
  cache::KvCache cache(shape, std::make_unique<Scripted>(last));
  expect_close(run(cache, cache.add_sequence(), stream, 20), plain(stream, last), 0.05);
}

// After every step and at every layer: live keys, bytes, pages and the peak of each, against a list
// of every key's lifetime; and the pages against what was really allocated.
TEST(KvCache, AccountsForEveryKeyAndEveryByteThatIsAllocated) {
  constexpr int32_t kLong = 700;
  for (const int32_t chunk : {1, 33, 256}) {
    SCOPED_TRACE("chunk " + std::to_string(chunk));
    const Stream stream = random_stream(kShape, kLong, 5);
    const auto last = random_lifetimes(kShape, kLong, 5);
    CountingMemory memory;
    cache::KvCache cache(kShape, std::make_unique<Scripted>(last), &memory);
    const int32_t slot = cache.add_sequence();
    const int64_t key_bytes = 2 * kShape.head_dim * 4,
                  page = kernels::page_bytes(16, DType::kFloat32);
    std::vector<int64_t> stored(kShape.layers * kShape.kv_heads, 0);  // keys of each list
    const auto pages = [&] {
      int64_t sum = 0;
      for (const int64_t keys : stored) sum += (keys + kernels::kPageKeys - 1) / kernels::kPageKeys;
      return sum;
    };
    int64_t peak_keys = 0, peak_pages = 0;
    for (int32_t begin = 0; begin < kLong; begin += chunk) {
      const int32_t size = std::min(chunk, kLong - begin), now = begin + size;
      step(cache, {slot}, {&stream}, {begin}, {size});
      for (int32_t layer = 0; layer < kShape.layers; ++layer) {
        for (int32_t h = 0; h < kShape.kv_heads; ++h) stored[layer * kShape.kv_heads + h] += size;
        peak_keys = std::max(peak_keys, std::accumulate(stored.begin(), stored.end(), int64_t{0}));
        peak_pages = std::max(peak_pages, pages());
        for (int32_t h = 0; h < kShape.kv_heads; ++h) {
          stored[layer * kShape.kv_heads + h] = std::ssize(alive(last[layer], h, now));
        }
      }
      const cache::Usage usage = cache.usage(), of_slot = cache.usage(slot);
      const int64_t live = std::accumulate(stored.begin(), stored.end(), int64_t{0});
      ASSERT_EQ(usage.live_keys, live);
      ASSERT_EQ(usage.live_bytes, live * key_bytes);
      ASSERT_EQ(usage.held_bytes, pages() * page);
      ASSERT_EQ(usage.held_bytes, memory.bytes);
      ASSERT_EQ(of_slot.live_keys, live);
      ASSERT_EQ(of_slot.held_bytes, usage.held_bytes);
      ASSERT_EQ(of_slot.metadata_bytes, usage.metadata_bytes);
      ASSERT_GE(usage.metadata_bytes, live * 12);  // position, last, score
    }
    EXPECT_EQ(cache.peak().live_keys, peak_keys);
    EXPECT_EQ(cache.peak().held_bytes, peak_pages * page);
    EXPECT_EQ(cache.peak().held_bytes, memory.peak);
    cache.reset_peak();
    EXPECT_EQ(cache.peak().live_keys, cache.usage().live_keys);

    cache.remove_sequence(slot);
    EXPECT_EQ(memory.bytes, 0);
    EXPECT_EQ(cache.usage().live_keys, 0);
    EXPECT_EQ(cache.usage().metadata_bytes, 0);
    EXPECT_EQ(cache.add_sequence(), slot);  // used again
    EXPECT_EQ(cache.length(slot), 0);
    run(cache, slot, stream, 256);
  }
}

TEST(KvCache, GivesEveryPageBackWhenItIsDestroyed) {
  CountingMemory memory;
  {
    const Stream stream = random_stream(kShape, kTokens, 6);
    cache::KvCache cache(kShape, std::make_unique<KeepAll>(), &memory);
    run(cache, cache.add_sequence(), stream, 50);
    cache::KvCache moved = std::move(cache);
    EXPECT_GT(memory.bytes, 0);
  }
  EXPECT_EQ(memory.bytes, 0);
}

TEST(KvCache, TreatsSequencesOfABatchAsIfEachWereAlone) {
  const Stream a = random_stream(kShape, 90, 7);
  Stream b = random_stream(kShape, 140, 8);
  b.score_weight = a.score_weight;
  const auto last = random_lifetimes(kShape, 140, 9);
  cache::KvCache together(kShape, std::make_unique<Scripted>(last));
  cache::KvCache alone(kShape, std::make_unique<Scripted>(last));
  const int32_t slot_a = together.add_sequence(), slot_b = together.add_sequence();
  const int32_t lone = alone.add_sequence();
  int32_t at_a = 0, at_b = 0;
  // b joins first, the steps are uneven, and a is done before b.
  for (const auto& [of_a, of_b] : {std::pair{0, 30}, {40, 1}, {1, 50}, {49, 7}, {0, 52}}) {
    const auto outs = step(together, {slot_a, slot_b}, {&a, &b}, {at_a, at_b}, {of_a, of_b});
    const auto expected = step(alone, {lone}, {&b}, {at_b}, {of_b});
    for (int32_t layer = 0; layer < kShape.layers; ++layer) {
      EXPECT_TRUE(at::equal(outs[1][layer], expected[0][layer]));
    }
    at_a += of_a;
    at_b += of_b;
  }
  EXPECT_EQ(together.length(slot_a), 90);
  EXPECT_EQ(together.length(slot_b), 140);
  EXPECT_EQ(together.live_positions(slot_b, 1, 1), alone.live_positions(lone, 1, 1));
  EXPECT_EQ(together.usage(slot_b).live_bytes, alone.usage().live_bytes);
}

// --- hooks, one test policy each ---

class ReadsEvenOnly : public KeepAll {
 public:
  bool selects() const override { return true; }
  void select(const cache::Queries& queries, int32_t head, const cache::StoredKeys& stored,
              std::span<uint8_t> read) override {
    EXPECT_EQ(queries.q.size(2), kShape.head_dim);
    EXPECT_LT(head, kShape.kv_heads);
    for (size_t j = 0; j < read.size(); ++j) read[j] = stored.position[j] % 2 == 0;
  }
};

TEST(Hooks, SelectHidesKeysFromAStepAndKeepsThem) {
  const Stream stream = random_stream(kShape, kTokens, 10);
  auto last = forever(kShape, kTokens);
  for (at::Tensor& x : last) {
    x = x.clone();
    x.slice(1, 1, kTokens, 2).fill_(-1);
  }
  for (const int32_t chunk : {1, 20}) {
    cache::KvCache cache(kShape, std::make_unique<ReadsEvenOnly>());
    const int32_t slot = cache.add_sequence();
    expect_close(run(cache, slot, stream, chunk), plain(stream, last));
    EXPECT_EQ(cache.live_per_head(slot)[0][0], kTokens);
  }
}

class AllAtOnePlace : public KeepAll {
 public:
  bool renumbers() const override { return true; }
  int32_t key_position(int32_t, int32_t, int32_t) const override { return 7; }
};
class AtTheirRank : public KeepAll {
 public:
  bool renumbers() const override { return true; }
  int32_t key_position(int32_t rank, int32_t, int32_t) const override { return rank; }
};

TEST(Hooks, RenumberingToOnePlaceEqualsNoRotation) {
  Stream stream = random_stream(kShape, kTokens, 11);
  for (const int32_t chunk : {1, 20, kTokens}) {
    cache::KvCache cache(kShape, std::make_unique<AllAtOnePlace>());
    const auto out = run(cache, cache.add_sequence(), stream, chunk);
    Stream unrotated = stream;
    unrotated.rotate = nullptr;
    expect_close(out, plain(unrotated, forever(kShape, kTokens)));
  }
}

TEST(Hooks, RenumberingToTheRankOfKeptKeysEqualsTheirPositions) {
  const Stream stream = random_stream(kShape, kTokens, 12);
  for (const int32_t chunk : {1, 20, kTokens}) {
    cache::KvCache cache(kShape, std::make_unique<AtTheirRank>());
    expect_close(run(cache, cache.add_sequence(), stream, chunk),
                 plain(stream, forever(kShape, kTokens)));
  }
}

class OddQueriesInPlace : public KeepAll {
 public:
  bool renumbers() const override { return true; }
  int32_t key_position(int32_t, int32_t live, int32_t position) const override {
    return live % 2 == 1 ? position : 7;
  }
};

TEST(Hooks, RenumberingMayPutAKeyBackToWhereItWas) {
  const Stream stream = random_stream(kShape, kTokens, 17);
  Stream unrotated = stream;
  unrotated.rotate = nullptr;
  const auto in_place = plain(stream, forever(kShape, kTokens));
  const auto moved = plain(unrotated, forever(kShape, kTokens));
  cache::KvCache cache(kShape, std::make_unique<OddQueriesInPlace>());
  const auto out = run(cache, cache.add_sequence(), stream, 20);
  for (int32_t layer = 0; layer < kShape.layers; ++layer) {
    for (int32_t i = 0; i < kTokens; ++i) {
      const auto& truth = (i + 1) % 2 == 1 ? in_place : moved;
      EXPECT_LT(worst_difference(out[layer][i], truth[layer][i]), 1e-5) << "token " << i;
    }
  }
}

// Adds up what every key received, by position.
class WatchesMass : public Scripted {
 public:
  WatchesMass(std::vector<at::Tensor> last, std::vector<at::Tensor>* received)
      : Scripted(std::move(last)), received_(received) {}
  bool wants_mass() const override { return true; }
  void after_step(int32_t, int32_t layer, int32_t, std::span<cache::StoredKeys> stored) override {
    for (size_t h = 0; h < stored.size(); ++h) {
      ASSERT_EQ(stored[h].mass.size(), stored[h].position.size());
      for (size_t j = 0; j < stored[h].position.size(); ++j) {
        stored[h].score[j] += stored[h].mass[j];  // moves with its key
        (*received_)[layer].accessor<float, 2>()[h][stored[h].position[j]] = stored[h].score[j];
      }
    }
  }

 private:
  std::vector<at::Tensor>* received_;
};

TEST(Hooks, MassIsTheProbabilityThatEachKeyReceivedAndScoresMoveWithTheirKeys) {
  const Stream stream = random_stream(kShape, kTokens, 13);
  const auto last = random_lifetimes(kShape, kTokens, 13);
  std::vector<at::Tensor> truth;
  plain(stream, last, &truth);
  for (const int32_t chunk : {1, 20, kTokens}) {
    std::vector<at::Tensor> received(kShape.layers);
    for (at::Tensor& x : received) x = at::full({kShape.kv_heads, kTokens}, 0.0f, at::kFloat);
    cache::KvCache cache(kShape, std::make_unique<WatchesMass>(last, &received));
    run(cache, cache.add_sequence(), stream, chunk);
    expect_close(received, truth, 1e-4);
  }
}

TEST(Hooks, MassIsGivenToRenumberingPoliciesToo) {
  class Both : public WatchesMass {
   public:
    using WatchesMass::WatchesMass;
    bool renumbers() const override { return true; }  // to the positions they have
  };
  const Stream stream = random_stream(kShape, kTokens, 13);
  const auto last = random_lifetimes(kShape, kTokens, 13);
  std::vector<at::Tensor> truth, received(kShape.layers);
  const auto outputs = plain(stream, last, &truth);
  for (at::Tensor& x : received) x = at::full({kShape.kv_heads, kTokens}, 0.0f, at::kFloat);
  cache::KvCache cache(kShape, std::make_unique<Both>(last, &received));
  expect_close(run(cache, cache.add_sequence(), stream, 20), outputs);
  expect_close(received, truth, 1e-4);
}

class ForgetsAfterEachStep : public KeepAll {
 public:
  void after_step(int32_t, int32_t, int32_t now, std::span<cache::StoredKeys> stored) override {
    for (cache::StoredKeys& keys : stored) {
      for (size_t j = 0; j < keys.position.size(); ++j) {
        if (keys.position[j] < now - 3) keys.last[j] = now - 1;
      }
    }
  }
};

TEST(Hooks, AfterAStepKeysCanBeGivenUpAtOnce) {
  const Stream stream = random_stream(kShape, kTokens, 14);
  cache::KvCache cache(kShape, std::make_unique<ForgetsAfterEachStep>());
  const int32_t slot = cache.add_sequence();
  run(cache, slot, stream, 16);
  EXPECT_EQ(cache.live_positions(slot, 1, 0), (std::vector<int32_t>{147, 148, 149}));
}

class LooksAtThePromptsEnd : public KeepAll {
 public:
  explicit LooksAtThePromptsEnd(std::vector<cache::Queries>* seen) : seen_(seen) {}
  int32_t query_window() const override { return 5; }
  void on_prefill_end(const cache::Queries& recent, std::span<cache::StoredKeys> stored) override {
    seen_->push_back(recent);
    for (cache::StoredKeys& keys : stored) {
      for (size_t j = 0; j < keys.position.size(); ++j) {
        if (keys.position[j] != 4) keys.last[j] = recent.first_position;
      }
    }
  }

 private:
  std::vector<cache::Queries>* seen_;
};

TEST(Hooks, ThePromptsEndShowsItsLastQueriesAndCanEvict) {
  const Stream stream = random_stream(kShape, kTokens, 15);
  for (const int32_t chunk : {1, 3, kTokens}) {
    std::vector<cache::Queries> seen;
    cache::KvCache cache(kShape, std::make_unique<LooksAtThePromptsEnd>(&seen));
    const int32_t slot = cache.add_sequence();
    run(cache, slot, stream, chunk);
    cache.finish_prefill(slot);
    ASSERT_EQ(std::ssize(seen), kShape.layers);
    const at::Tensor position = at::arange(kTokens, at::kInt);
    for (int32_t layer = 0; layer < kShape.layers; ++layer) {
      EXPECT_EQ(seen[layer].layer, layer);
      EXPECT_EQ(seen[layer].first_position, kTokens - 5);
      const at::Tensor rotated = rotate_half(stream.q[layer], position).narrow(0, kTokens - 5, 5);
      EXPECT_LT(worst_difference(seen[layer].q, rotated), 1e-6);
      EXPECT_EQ(cache.live_positions(slot, layer, 0), std::vector<int32_t>{4});
    }
  }
}

class CountsResets : public KeepAll {
 public:
  explicit CountsResets(std::vector<int32_t>* slots) : slots_(slots) {}
  void reset(int32_t slot) override { slots_->push_back(slot); }

 private:
  std::vector<int32_t>* slots_;
};

TEST(Hooks, APolicyHearsThatASlotWasEmptied) {
  std::vector<int32_t> resets;
  cache::KvCache cache(kShape, std::make_unique<CountsResets>(&resets));
  cache.add_sequence();
  const int32_t second = cache.add_sequence();
  cache.remove_sequence(second);
  EXPECT_EQ(resets, std::vector<int32_t>{second});
}

TEST(Hooks, OpenKeysEndWithTheTokenThatEndsThem) {
  const std::vector<int32_t> position{0, 1, 2, 3};
  std::vector<int32_t> last{kForever, kOpenEnded, 9, kOpenEnded};
  cache::StoredKeys keys{position, last, {}, {}};
  cache::end_open(keys, 12);
  EXPECT_EQ(last, (std::vector<int32_t>{kForever, 12, 9, 12}));
}

// --- misuse ---

TEST(KvCache, SaysWhatIsWrongWithItsUse) {
  const auto make = [](cache::Shape shape) {
    return [shape] { cache::KvCache(shape, std::make_unique<KeepAll>()); };
  };
  EXPECT_THAT(error_of(make({0, 4, 2, 16})), testing::HasSubstr("layers"));
  EXPECT_THAT(error_of(make({2, 3, 2, 16})), testing::HasSubstr("3 query heads"));
  EXPECT_THAT(error_of(make({2, 4, 2, 12})), testing::HasSubstr("multiple of 8"));
  EXPECT_THAT(error_of(make({2, 4, 2, 16, at::kDouble})),
              testing::HasSubstr("float32 or bfloat16"));

  const Stream stream = random_stream(kShape, 8, 16);
  cache::KvCache cache(kShape, std::make_unique<KeepAll>());
  const int32_t slot = cache.add_sequence();
  EXPECT_THAT(error_of([&] { cache.length(slot + 1); }), testing::HasSubstr("holds no sequence"));
  EXPECT_THAT(error_of([&] {
                step(cache, {slot, slot}, {&stream, &stream}, {0, 0}, {1, 1});
              }),
              testing::HasSubstr("twice"));
  cache::LayerInput input;
  input.q = stream.q[0].narrow(0, 0, 1);
  input.k = stream.k[0].narrow(0, 0, 1);
  input.v = stream.v[0].narrow(0, 0, 1);
  const cache::Step one{{slot}, {0, 1}};
  EXPECT_THAT(error_of([&] { cache.attend(1, one, input); }), testing::HasSubstr("layer 0"));
  EXPECT_THAT(error_of([&] {
                cache.attend(0, {{slot}, {0}}, input);
              }),
              testing::HasSubstr("row starts"));
  EXPECT_THAT(error_of([&] {
                cache.attend(0, {{slot}, {0, 2}}, input);
              }),
              testing::HasSubstr("[2, 4, 16]"));
  cache.attend(0, one, input);
  EXPECT_THAT(error_of([&] { cache.finish_step(one); }), testing::HasSubstr("after 1 of 2"));
  // What a caller does after an error inside a step: the sequence goes, the cache stays.
  cache.remove_sequence(slot);
  const int32_t again = cache.add_sequence();
  run(cache, again, stream, 3);
  EXPECT_EQ(cache.length(again), 8);
}

}  // namespace
}  // namespace natslm::test
