// The pure half of the sorted keys: runs of query tiles against brute force over visible(), and the
// numbers of the work list's counting sort.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/cuda/sorted_keys.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/key_runs.h"

namespace natslm::kernels::cuda {
namespace {

// The keys of one (sequence, KV head) in an order of three segments.
struct OrderedKeys {
  std::vector<int32_t> position, last;
  int32_t ends[KeyOrder::kSegments] = {};
  int32_t reach = 0;
  std::string describe() const {
    std::string text = "reach " + std::to_string(reach) + ", position:last";
    for (size_t place = 0; place < position.size(); ++place) {
      for (const int32_t end : ends) text += static_cast<int32_t>(place) == end ? " |" : "";
      text += " " + std::to_string(position[place]) + ":" +
              (last[place] == kForever ? "-" : std::to_string(last[place]));
    }
    return text;
  }
};

// Keys 0 .. n-1 with the given lifetimes and segments, if that is an order the contract allows.
bool arrange(const std::vector<int32_t>& last, const std::vector<int>& segment, int32_t reach,
             OrderedKeys& keys) {
  keys = {};
  keys.reach = reach;
  for (int s = 0; s < KeyOrder::kSegments; ++s) {
    int32_t before = -1;
    for (int32_t j = 0; j < std::ssize(last); ++j) {
      if (segment[j] != s) continue;
      if (s < 2 && last[j] < before) return false;
      if (s == 2 && last[j] > j + reach) return false;
      before = last[j];
      keys.position.push_back(j);
      keys.last.push_back(last[j]);
    }
    keys.ends[s] = static_cast<int32_t>(keys.position.size());
  }
  return true;
}

std::vector<KeyRun> runs_of(const OrderedKeys& keys, int32_t q0, int32_t q1) {
  std::vector<KeyRun> runs;
  for (int s = 0; s < KeyOrder::kSegments; ++s) {
    int32_t place[kRunBounds];
    for (int bound = 0; bound < kRunBounds; ++bound) {
      place[bound] = first_place(run_search(s, bound, keys.position.data(), keys.last.data(),
                                            keys.ends, keys.reach, q0, q1));
    }
    runs.push_back(ordered_run(place[0], place[1], place[2], place[3]));
  }
  return runs;
}

void check_tile(const OrderedKeys& keys, int32_t q0, int32_t q1) {
  const std::vector<KeyRun> runs = runs_of(keys, q0, q1);
  const auto where = [&] {
    return keys.describe() + ", queries " + std::to_string(q0) + ".." + std::to_string(q1);
  };
  for (int s = 0; s < KeyOrder::kSegments; ++s) {
    const int32_t begin = s == 0 ? 0 : keys.ends[s - 1], end = keys.ends[s];
    const KeyRun& run = runs[s];
    ASSERT_TRUE(begin <= run.begin && run.begin <= run.full_begin &&
                run.full_begin <= run.full_end && run.full_end <= run.end && run.end <= end)
        << where() << ", segment " << s;
    for (int32_t place = begin; place < end; ++place) {
      bool some = false, all = true;
      for (int32_t i = q0; i <= q1; ++i) {
        const bool seen = visible(i, keys.position[place], keys.last[place]);
        some |= seen;
        all &= seen;
      }
      const bool in_run = run.begin <= place && place < run.end;
      const bool in_full = run.full_begin <= place && place < run.full_end;
      ASSERT_TRUE(in_run || !some) << where() << ": place " << place << " is missed";
      ASSERT_TRUE(all || !in_full) << where() << ": place " << place << " is not full";
      if (s == 2) continue;
      // Where `last` never falls nothing is left over either: of the keys in the run only those
      // that no query at all reads are of no use, and every key that all queries read is full.
      ASSERT_TRUE(some || !in_run || keys.last[place] < keys.position[place])
          << where() << ": place " << place << " is of no use";
      ASSERT_TRUE(in_full || !all) << where() << ": place " << place << " is full";
    }
  }
}

// Every assignment of lifetimes and segments to up to four keys that the contract allows.
TEST(KeyRuns, HoldEveryVisiblePairOfEverySmallProblem) {
  int64_t problems = 0;
  for (int32_t n = 0; n <= 4; ++n) {
    const int32_t choices = n + 2;  // last = j - 1 (never read), j .. n - 1 and for ever
    int64_t codes = 1;
    for (int32_t j = 0; j < n; ++j) codes *= choices * KeyOrder::kSegments;
    for (int64_t code = 0; code < codes; ++code) {
      std::vector<int32_t> last(n);
      std::vector<int> segment(n);
      int64_t rest = code;
      for (int32_t j = 0; j < n; ++j) {
        const auto choice = static_cast<int32_t>(rest % choices);
        last[j] = choice == choices - 1 ? kForever : std::max(j - 1, choice - 1);
        rest /= choices;
        segment[j] = static_cast<int>(rest % KeyOrder::kSegments);
        rest /= KeyOrder::kSegments;
      }
      for (const int32_t reach : {0, 1, 3}) {
        OrderedKeys keys;
        if (!arrange(last, segment, reach, keys)) continue;
        ++problems;
        for (int32_t q0 = 0; q0 < n; ++q0) {
          for (int32_t q1 = q0; q1 < n; ++q1) check_tile(keys, q0, q1);
        }
        if (HasFailure()) return;
      }
    }
  }
  EXPECT_GT(problems, 10000);
}

TEST(KeyRuns, HoldEveryVisiblePairOfRandomProblems) {
  for (uint32_t seed = 1; seed <= 400; ++seed) {
    uint32_t draws = 0;
    const auto draw = [&](int32_t below) {
      return static_cast<int32_t>(philox({seed, 3}, {draws++, 0, 0, 0})[0] % below);
    };
    const int32_t n = 1 + draw(200), reach = draw(40);
    std::vector<int32_t> last(n);
    std::vector<int> segment(n);
    int32_t event = n;  // the next event; now and then none is left
    for (int32_t j = n - 1; j >= 0; --j) {
      const int32_t kind = draw(4);
      if (kind == 0) event = j;
      last[j] = kind == 0 || event == n ? kForever : event;
      segment[j] = last[j] == kForever ? 0 : last[j] - j > reach ? 1 : 2;
      if (kind == 3) {
        last[j] = j - 1 + draw(reach + 2);
        segment[j] = 2;
      }
    }
    OrderedKeys keys;
    ASSERT_TRUE(arrange(last, segment, reach, keys));
    const int32_t tile = 1 + draw(70);
    for (int32_t q0 = 0; q0 < n; q0 += tile) check_tile(keys, q0, std::min(q0 + tile, n) - 1);
    if (HasFailure()) return;
  }
}

TEST(WorkBucket, FallsWithTheKeysAndFitsItsSixteenBits) {
  for (const int32_t tokens : {1, 63, 64, 65, 1000, 65472, 65473, 131072, 2000000, kMaxPosition}) {
    EXPECT_EQ(work_bucket(0, tokens), kWorkBuckets - 1) << tokens;
    EXPECT_EQ(work_bucket(1, tokens), kWorkBuckets - 2) << tokens;
    const int32_t step = std::max(1, tokens / 5000);
    int32_t before = kWorkBuckets - 1;
    for (int32_t keys = 0; keys < tokens - step; keys += step) {
      const int32_t bucket = work_bucket(keys, tokens);
      ASSERT_TRUE(0 <= bucket && bucket <= before) << keys << " of " << tokens;
      before = bucket;
    }
    EXPECT_GE(work_bucket(tokens, tokens), 0);
    // Position order counts whole key tiles, of which the last may be cut short.
    EXPECT_GE(work_bucket(tokens, std::max(1, tokens - kBoundKeys)), 0);
  }
}

TEST(WorkBucket, HoldsNoMoreThanItsWidth) {
  EXPECT_EQ(work_bucket(64, 4096), kWorkBuckets - 2);
  EXPECT_EQ(work_bucket(65, 4096), kWorkBuckets - 3);
  EXPECT_EQ(work_bucket(131072, 131072), kWorkBuckets - 1 - (131072 + 128) / 129);
}

TEST(WorkChunks, CoverTheItemsInFewWholeSlices) {
  for (int64_t items : {0, 1, 2047, 2048, 2049, 131071, 131072, 131073, 500000, 40000000}) {
    const WorkChunks chunks = work_chunks(items);
    EXPECT_EQ(chunks.items % (kWorkSlice * kWorkWarps), 0) << items;
    EXPECT_LE(chunks.chunks, kMaxWorkChunks) << items;
    EXPECT_GE(int64_t{chunks.items} * chunks.chunks, items) << items;
    EXPECT_TRUE(items == 0 || int64_t{chunks.items} * (chunks.chunks - 1) < items) << items;
  }
}

}  // namespace
}  // namespace natslm::kernels::cuda
