// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using testing::HasSubstr;
using Ids = std::vector<int32_t>;

Ids counting(int64_t tokens, int32_t first = 0) {
  Ids ids(tokens);
  std::iota(ids.begin(), ids.end(), first);
  return ids;
}

PackedTokens packed(const std::filesystem::path& path, const Ids& ids, int32_t vocabulary,
                    uint64_t fingerprint = 1) {
  PackedTokensWriter writer(path, vocabulary, fingerprint);
  writer.append(ids.data(), static_cast<int64_t>(ids.size()));
  writer.commit();
  return PackedTokens(path);
}

std::vector<int64_t> order_of(int64_t size, uint64_t seed, uint64_t epoch) {
  const WindowOrder order(size, seed, epoch);
  std::vector<int64_t> result(size);
  for (int64_t i = 0; i < size; ++i) result[i] = order(i);
  return result;
}

TEST(WindowOrder, IsAPermutationForEverySize) {
  std::vector<int64_t> sizes(600);
  std::iota(sizes.begin(), sizes.end(), 1);
  for (const int64_t more : {1023, 1024, 1025, 4096, 4097, 65535, 65537, 100003})
    sizes.push_back(more);
  for (const int64_t size : sizes) {
    std::vector<int64_t> order = order_of(size, size, 3);
    std::ranges::sort(order);
    for (int64_t i = 0; i < size; ++i) ASSERT_EQ(order[i], i) << "size " << size;
  }
}

TEST(WindowOrder, StaysInsideVeryLargeSizes) {
  const int64_t size = (int64_t{1} << 40) + 12345;
  const WindowOrder order(size, 1, 2);
  for (int64_t i = 0; i < 1000; ++i) {
    EXPECT_GE(order(size - 1 - i), 0);
    EXPECT_LT(order(size - 1 - i), size);
  }
}

TEST(WindowOrder, DependsOnSeedAndEpoch) {
  EXPECT_EQ(order_of(1000, 1, 0), order_of(1000, 1, 0));
  EXPECT_NE(order_of(1000, 1, 0), order_of(1000, 2, 0));
  EXPECT_NE(order_of(1000, 1, 0), order_of(1000, 1, 1));
}

TEST(WindowOrder, ShufflesWell) {
  // Of a random permutation one place in expectation is fixed and neighbours are n / 3 apart on
  // average.
  for (const int64_t size : {50, 1000, 5000}) {
    double fixed = 0, apart = 0, first_half = 0;
    const int trials = 40;
    for (int trial = 0; trial < trials; ++trial) {
      const auto order = order_of(size, trial, 7);
      for (int64_t i = 0; i < size; ++i) fixed += order[i] == i;
      for (int64_t i = 1; i < size; ++i)
        apart += std::abs(static_cast<double>(order[i] - order[i - 1]));
      for (int64_t i = 0; i < size / 2; ++i) first_half += order[i] < size / 2;
    }
    EXPECT_LT(fixed / trials, 3) << size;
    EXPECT_NEAR(apart / trials / static_cast<double>(size - 1) / static_cast<double>(size), 1.0 / 3,
                0.03)
        << size;
    EXPECT_NEAR(first_half / trials / static_cast<double>(size), 0.25, 0.03) << size;
  }
}

TEST(TokenDataset, AnEpochReadsEachWindowOnce) {
  const int64_t context = 8;
  const TokenDataset data(counting(1000), 1000, 5);
  const int64_t windows = data.windows(context);
  EXPECT_EQ(windows, 124);  // (1000 - 1) / 8
  std::vector<std::vector<int64_t>> orders;
  for (const int64_t epoch : {0, 1}) {
    std::vector<int64_t> starts;
    Ids out(context + 1);
    for (int64_t i = 0; i < windows; ++i) {
      int64_t id = -1;
      data.fill_samples(epoch * windows + i, 1, context, out.data(), &id);
      EXPECT_EQ(id, epoch * windows + i);
      EXPECT_EQ(out, counting(context + 1, out[0]));
      starts.push_back(out[0]);
    }
    EXPECT_FALSE(std::ranges::is_sorted(starts));
    orders.push_back(starts);
    std::ranges::sort(starts);
    for (int64_t i = 0; i < windows; ++i) EXPECT_EQ(starts[i], i * context);
  }
  EXPECT_NE(orders[0], orders[1]);
}

TEST(TokenDataset, AResumedRunAndAnyBatchingReadTheSame) {
  const int64_t context = 5, batch = 6, steps = 40;  // several epochs, with steps that span two
  const auto make = [] { return TokenDataset(counting(333), 333, 9); };
  const TokenDataset whole = make();
  Ids all(steps * batch * (context + 1));
  std::vector<int64_t> ids(steps * batch);
  for (int64_t step = 0; step < steps; ++step) {
    whole.fill(step, batch, context, all.data() + step * batch * (context + 1),
               ids.data() + step * batch);
  }
  std::vector<int64_t> expected_ids(steps * batch);
  std::iota(expected_ids.begin(), expected_ids.end(), 0);
  EXPECT_EQ(ids, expected_ids);

  const TokenDataset resumed = make();
  Ids tail((steps - 17) * batch * (context + 1));
  for (int64_t step = 17; step < steps; ++step) {
    resumed.fill(step, batch, context, tail.data() + (step - 17) * batch * (context + 1), nullptr);
  }
  EXPECT_TRUE(std::equal(tail.begin(), tail.end(), all.begin() + 17 * batch * (context + 1)));

  Ids other(all.size());
  for (int64_t step = 0; step < steps * 2; ++step) {
    resumed.fill(step, batch / 2, context, other.data() + step * batch / 2 * (context + 1),
                 nullptr);
  }
  EXPECT_EQ(other, all);
}

TEST(TokenDataset, NoWindowCrossesFromOneFileToTheNext) {
  const ScratchFolder folder;
  const TokenDataset data(
      {packed(folder / "a", counting(20), 2000), packed(folder / "b", counting(4, 500), 2000),
       packed(folder / "c", counting(25, 1000), 2000)},
      1);
  const int64_t context = 6;
  EXPECT_EQ(data.tokens(), 49);
  EXPECT_EQ(data.windows(context), 3 + 0 + 4);
  Ids out(context + 1);
  std::vector<int32_t> starts;
  for (int64_t i = 0; i < data.windows(context); ++i) {
    data.window(i, context, out.data());
    EXPECT_EQ(out, counting(context + 1, out[0]));
    starts.push_back(out[0]);
  }
  EXPECT_EQ(starts, (Ids{0, 6, 12, 1000, 1006, 1012, 1018}));
}

TEST(TokenDataset, FilesAndMemoryGiveTheSame) {
  const ScratchFolder folder;
  const TokenDataset file({packed(folder / "a", counting(500), 500)}, 3),
      memory(counting(500), 500, 3);
  Ids a(4 * 11), b(4 * 11);
  file.fill(2, 4, 10, a.data(), nullptr);
  memory.fill(2, 4, 10, b.data(), nullptr);
  EXPECT_EQ(a, b);
}

TEST(TokenDataset, OneWindowExactlyAndOneTokenLess) {
  Ids out(2 * 11);
  TokenDataset(counting(11), 11, 1).fill(0, 2, 10, out.data(), nullptr);
  EXPECT_EQ(Ids(out.begin(), out.begin() + 11), counting(11));
  EXPECT_EQ(Ids(out.begin() + 11, out.end()), counting(11));
  const TokenDataset shorter(counting(10), 11, 1);
  EXPECT_EQ(shorter.windows(10), 0);
  EXPECT_THAT(error_of([&] { shorter.fill(0, 1, 10, out.data(), nullptr); }),
              HasSubstr("the text has 10 tokens, a window needs 11"));
}

TEST(TokenDataset, FilesOfDifferentTokenizersAreRefused) {
  const ScratchFolder folder;
  const auto a = packed(folder / "a", counting(20), 500, 1),
             b = packed(folder / "b", counting(20), 500, 2),
             c = packed(folder / "c", counting(20), 501, 1);
  EXPECT_THAT(error_of([&] { TokenDataset({a, b}, 1); }), HasSubstr("another tokenizer"));
  EXPECT_NE(error_of([&] { TokenDataset({a, c}, 1); }), "");
  EXPECT_NE(error_of([&] { TokenDataset(std::vector<PackedTokens>{}, 1); }), "");
  EXPECT_NE(error_of([&] { TokenDataset(counting(5), 4, 1); }), "");
}

}  // namespace
}  // namespace natslm::data
