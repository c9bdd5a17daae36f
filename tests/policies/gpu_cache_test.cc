// The cache with its pages on a GPU against the same cache on the CPU, for every policy: the same
// keys live, the same account, outputs as near as bf16 allows. Without a GPU everything is skipped,
// loudly.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>

#include "natslm/cache/kv_cache.h"
#include "natslm/cache/page_storage.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/kernels/gpu_head_dim.h"
#include "natslm/policies/policies.h"
#include "tests/cache/cache_streams.h"
#include "tests/support/plain_policies.h"

namespace natslm::test {
namespace {

// Of outputs whose values are of the size of 1: what two kernels that round to bf16 may differ by.
constexpr double kAllowed = 0.02;

class OnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (at::detail::getCUDAHooks().deviceCount() == 0) {
      std::printf("*** GPU TEST SKIPPED: LibTorch sees no GPU here ***\n");
      GTEST_SKIP() << "LibTorch sees no GPU here";
    }
  }

  static at::Device gpu() { return at::Device(at::kCUDA, 0); }
  static cache::Shape shape(at::Device device, int32_t head_dim, int32_t group) {
    cache::Shape shape{2, 2 * group, 2, head_dim, at::kBFloat16};
    shape.device = device;
    return shape;
  }
};

// Passes pages on and counts them.
class CountingMemory : public std::pmr::memory_resource {
 public:
  explicit CountingMemory(const at::Device& device) : pages_(cache::make_device_memory(device)) {}
  int64_t bytes = 0;

 private:
  void* do_allocate(size_t size, size_t alignment) override {
    bytes += static_cast<int64_t>(size);
    return pages_->allocate(size, alignment);
  }
  void do_deallocate(void* memory, size_t size, size_t alignment) override {
    bytes -= static_cast<int64_t>(size);
    pages_->deallocate(memory, size, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  std::unique_ptr<std::pmr::memory_resource> pages_;
};

// Feeds a stream to both caches, `chunk` tokens at a time up to `prompt`, then one by one, and
// compares all that can be seen.
void expect_same(cache::KvCache& host, cache::KvCache& device, const Stream& stream, int32_t prompt,
                 int32_t chunk) {
  const Stream there = on_device(stream, device.shape().device);
  const int32_t a = host.add_sequence(), b = device.add_sequence();
  for (int32_t begin = 0; begin < stream.tokens;) {
    const int32_t size = begin < prompt ? std::min(chunk, prompt - begin) : 1;
    const auto expected = step(host, {a}, {&stream}, {begin}, {size});
    const auto got = step(device, {b}, {&there}, {begin}, {size});
    begin += size;
    if (begin == prompt) {
      host.finish_prefill(a);
      device.finish_prefill(b);
    }
    for (size_t layer = 0; layer < expected[0].size(); ++layer) {
      ASSERT_LT(worst_difference(expected[0][layer], got[0][layer]), kAllowed)
          << "layer " << layer << " after token " << begin << ", chunk " << chunk;
    }
    const cache::Usage usage = host.usage(), usage_there = device.usage();
    ASSERT_EQ(usage.live_keys, usage_there.live_keys) << "after token " << begin;
    // There heads are as large as the kernels have them.
    const int64_t own = host.shape().head_dim,
                  filled = kernels::gpu_head_dim(host.shape().head_dim);
    ASSERT_EQ(usage.live_bytes / own * filled, usage_there.live_bytes) << "after token " << begin;
    ASSERT_EQ(usage.held_bytes / own * filled, usage_there.held_bytes) << "after token " << begin;
  }
  for (int32_t list = 0; list < host.shape().layers * host.shape().kv_heads; ++list) {
    const int32_t layer = list / host.shape().kv_heads, head = list % host.shape().kv_heads;
    EXPECT_EQ(host.live_positions(a, layer, head), device.live_positions(b, layer, head));
  }
  host.remove_sequence(a);
  device.remove_sequence(b);
}

TEST_F(OnGpu, EveryPolicyKeepsTheSameKeysAndAttendsAlike) {
  for (const auto& [group, head_dim] : {std::pair{1, 64}, {4, 128}, {2, 96}, {1, 8}, {4, 256}}) {
    const cache::Shape here = shape(at::kCPU, head_dim, group),
                       there = shape(gpu(), head_dim, group);
    const Stream stream = random_stream(here, 420, 7 + group);
    for (const policies::Entry& entry : policies::table()) {
      SCOPED_TRACE(std::string(entry.name) + ", group " + std::to_string(group) + ", heads of " +
                   std::to_string(head_dim));
      const policies::PolicyContext context{here, {roles::RoleSet::kGls, 40, 1}, 0, 420, 3};
      for (const int32_t chunk : {16, 150, 400}) {  // 400: the whole prompt
        auto policy = policies::make_policy(entry.name, context);
        const int32_t limit = policy->chunk_limit() > 0 ? policy->chunk_limit() : chunk;
        cache::KvCache host(here, std::move(policy));
        cache::KvCache device(there, policies::make_policy(entry.name, context));
        expect_same(host, device, stream, 400, std::min(chunk, limit));
      }
    }
  }
}

// A prompt is attended to by other kernels than the rows around it.
TEST_F(OnGpu, APromptBesideOtherSequencesGivesWhatItGivesAlone) {
  const cache::Shape here = shape(at::kCPU, 64, 4), there = shape(gpu(), 64, 4);
  const Stream first = random_stream(here, 60, 1);
  Stream prompt = random_stream(here, 300, 2), last = random_stream(here, 40, 3);
  prompt.score_weight = last.score_weight = first.score_weight;  // one model reads them all
  const auto moved = [&](const Stream& stream) { return on_device(stream, there.device); };
  const Stream first_there = moved(first), prompt_there = moved(prompt), last_there = moved(last);
  const policies::PolicyContext context{here, {roles::RoleSet::kGls, 40, 1}, 0, 300, 3};
  for (const char* policy : {"full", "learned", "streaming:sinks=2,window=30"}) {
    SCOPED_TRACE(policy);
    cache::KvCache host(here, policies::make_policy(policy, context)),
        together(there, policies::make_policy(policy, context)),
        alone(there, policies::make_policy(policy, context));
    for (cache::KvCache* cache : {&host, &together, &alone}) {
      for (int32_t slot = 0; slot < 3; ++slot) ASSERT_EQ(cache->add_sequence(), slot);
    }
    step(host, {0}, {&first}, {0}, {50});
    step(together, {0}, {&first_there}, {0}, {50});
    const auto expected =
        step(host, {0, 1, 2}, {&first, &prompt, &last}, {50, 0, 0}, {10, 300, 40});
    const auto got = step(together, {0, 1, 2}, {&first_there, &prompt_there, &last_there},
                          {50, 0, 0}, {10, 300, 40});
    const auto by_itself = step(alone, {1}, {&prompt_there}, {0}, {300});
    for (size_t s = 0; s < expected.size(); ++s) {
      for (size_t layer = 0; layer < expected[s].size(); ++layer) {
        EXPECT_LT(worst_difference(expected[s][layer], got[s][layer]), kAllowed)
            << "sequence " << s << ", layer " << layer;
      }
    }
    // Score logits come from a matrix product over the rows of all sequences, whose last bits
    // depend on their number: where a policy needs none, not a bit does.
    const double allowed = policy == std::string("learned") ? kAllowed : 0;
    for (size_t layer = 0; layer < by_itself[0].size(); ++layer) {
      EXPECT_LE(worst_difference(by_itself[0][layer], got[1][layer]), allowed) << "layer " << layer;
    }
    EXPECT_EQ(host.usage().live_keys, together.usage().live_keys);
  }
}

TEST_F(OnGpu, AccountsForEveryPageAndGivesThemAllBack) {
  const cache::Shape here = shape(at::kCPU, 64, 2), there = shape(gpu(), 64, 2);
  const Stream stream = on_device(random_stream(here, 700, 5), gpu());
  const auto last = random_lifetimes(here, 700, 5);
  CountingMemory memory(gpu());
  {
    cache::KvCache cache(there, std::make_unique<Scripted>(last, false), &memory);
    const int32_t slot = cache.add_sequence();
    for (int32_t begin = 0; begin < 700; begin += 100) {
      step(cache, {slot}, {&stream}, {begin}, {100});
      const cache::Usage usage = cache.usage(), of_slot = cache.usage(slot);
      const int64_t pages = usage.held_bytes / kernels::page_bytes(64, DType::kBFloat16);
      EXPECT_EQ(memory.bytes, pages * kernels::GpuPage{64}.bytes());
      EXPECT_GE(usage.metadata_bytes, pages * kernels::GpuPage::kMetadataBytes);
      EXPECT_EQ(usage.metadata_bytes, of_slot.metadata_bytes);
      EXPECT_LE(usage.held_bytes, usage.live_bytes + 4 * kernels::page_bytes(64, DType::kBFloat16));
    }
    cache.remove_sequence(slot);
    EXPECT_EQ(memory.bytes, 0);
    EXPECT_EQ(cache.usage().metadata_bytes, 0);
    run(cache, cache.add_sequence(), stream, 300);
  }
  EXPECT_EQ(memory.bytes, 0);
}

TEST_F(OnGpu, EvictionChangesNoOutput) {
  const cache::Shape here = shape(at::kCPU, 64, 4), there = shape(gpu(), 64, 4);
  for (const bool edits : {false, true}) {
    const Stream stream = random_stream(here, 300, 11);
    const auto last = random_lifetimes(here, 300, 11);
    cache::KvCache host(here, std::make_unique<Scripted>(last, edits));
    cache::KvCache device(there, std::make_unique<Scripted>(last, edits));
    expect_same(host, device, stream, 260, 33);
  }
}

TEST_F(OnGpu, AHeadWhosePageTableGrowsLosesNoPageOfTheHeadsBefore) {
  const cache::Shape here = shape(at::kCPU, 64, 2), there = shape(gpu(), 64, 2);
  const Stream stream = random_stream(here, 640, 13);
  // Head 0 keeps every other key and takes a new page in the step in which head 1 outgrows its
  // table (512 keys).
  std::vector<at::Tensor> last;
  for (int32_t layer = 0; layer < here.layers; ++layer) {
    last.push_back(at::full({2, 640}, kForever, at::kInt));
    auto head0 = last.back().accessor<int32_t, 2>()[0];
    for (int32_t j = 1; j < 640; j += 2) head0[j] = j;
  }
  cache::KvCache host(here, std::make_unique<Scripted>(last, false));
  cache::KvCache device(there, std::make_unique<Scripted>(last, false));
  expect_same(host, device, stream, 640, 64);
}

TEST_F(OnGpu, ASequenceDoesNotDependOnItsNeighbours) {
  const cache::Shape there = shape(gpu(), 128, 4);
  const Stream a = on_device(random_stream(shape(at::kCPU, 128, 4), 200, 1), gpu());
  Stream b = on_device(random_stream(shape(at::kCPU, 128, 4), 260, 2), gpu());
  const auto last = random_lifetimes(there, 260, 3);
  cache::KvCache together(there, std::make_unique<Scripted>(last, false));
  cache::KvCache alone(there, std::make_unique<Scripted>(last, false));
  const int32_t slot_a = together.add_sequence(), slot_b = together.add_sequence();
  const int32_t lone = alone.add_sequence();
  int32_t at_a = 0, at_b = 0;
  for (const auto& [of_a, of_b] : {std::pair{0, 130}, {90, 1}, {1, 80}, {109, 1}, {0, 48}}) {
    const auto outs = step(together, {slot_a, slot_b}, {&a, &b}, {at_a, at_b}, {of_a, of_b});
    const auto expected = step(alone, {lone}, {&b}, {at_b}, {of_b});
    for (int32_t layer = 0; layer < there.layers; ++layer) {
      EXPECT_EQ(worst_difference(outs[1][layer], expected[0][layer]), 0) << "layer " << layer;
    }
    at_a += of_a;
    at_b += of_b;
  }
}

// Reads every other key, and renumbers nothing.
class ReadsEvenOnly : public cache::Policy {
 public:
  std::string spec() const override { return "even"; }
  void on_append(cache::NewKeys&, std::span<cache::StoredKeys>) override {}
  bool edits_stored() const override { return false; }
  bool selects() const override { return true; }
  void select(const cache::Queries&, int32_t, const cache::StoredKeys& stored,
              std::span<uint8_t> read) override {
    for (size_t j = 0; j < read.size(); ++j) read[j] = stored.position[j] % 2 == 0;
  }
};

// Renumbers to the ranks among the live keys, and asks for masses, which it adds up.
class RanksWithMass : public cache::Policy {
 public:
  std::string spec() const override { return "ranks"; }
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys>) override {
    const int64_t n = fresh.last.size(1);
    for (int64_t t = 0; t < n; ++t) {
      if ((fresh.first_position + t) % 3 == 1) {
        fresh.last.select(1, t).fill_(fresh.first_position + t + 30);
      }
    }
  }
  void after_step(int32_t, int32_t, int32_t, std::span<cache::StoredKeys> stored) override {
    for (const cache::StoredKeys& keys : stored) {
      for (const float mass : keys.mass) total += mass;
    }
  }
  bool wants_mass() const override { return true; }
  bool renumbers() const override { return true; }
  int32_t key_position(int32_t rank, int32_t, int32_t) const override { return rank; }
  double total = 0;
};

TEST_F(OnGpu, SelectingAndRenumberingPoliciesAttendAlike) {
  const cache::Shape here = shape(at::kCPU, 64, 2), there = shape(gpu(), 64, 2);
  const Stream stream = random_stream(here, 220, 21);
  {
    cache::KvCache host(here, std::make_unique<ReadsEvenOnly>());
    cache::KvCache device(there, std::make_unique<ReadsEvenOnly>());
    expect_same(host, device, stream, 210, 40);
  }
  auto a = std::make_unique<RanksWithMass>(), b = std::make_unique<RanksWithMass>();
  const RanksWithMass &of_host = *a, &of_device = *b;
  cache::KvCache host(here, std::move(a)), device(there, std::move(b));
  expect_same(host, device, stream, 210, 70);
  EXPECT_NEAR(of_host.total, of_device.total, 1e-3 * of_host.total);
  EXPECT_NEAR(of_host.total, 220.0 * 4 * 2, 1);  // queries x heads x layers
}

}  // namespace
}  // namespace natslm::test
