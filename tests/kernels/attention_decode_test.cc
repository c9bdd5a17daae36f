// Attention over cached pages: the fast kernel against the definition in double precision.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_decode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"
#include "tests/support/decode_case.h"

namespace natslm::test {
namespace {

using kernels::AttentionDecode;
using kernels::kPageKeys;

// Judged together, so that "twice the plain one's worst error" is not one lucky draw of a small
// problem. All of one type.
void expect_right(const std::vector<DecodeCase>& cases) {
  DecodeResult truth, plain, fast;
  for (const DecodeCase& c : cases) {
    append(truth, run_decode(c, kernels::reference::run));
    append(plain, run_decode(c, plain_decode));
    append(fast, run_decode(c, kernels::cpu::run, plain_threads(3)));
  }
  EXPECT_EQ(compare_decode(fast, plain, truth, cases.front()), "");
}

TEST(AttentionDecode, IsRightInEveryNamedCornerInBothTypes) {
  for (DecodeCase c : decode_corners()) {
    expect_right({c});
    c.dtype = DType::kBFloat16;
    expect_right({c});
  }
}

DecodeCase random_decode_case(uint64_t seed, DType dtype) {
  std::mt19937_64 random(seed);
  const auto in = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  DecodeCase c{"random, and the nine seeds after it", seed};
  c.kv_heads = in(1, 3);
  c.q_heads = c.kv_heads * in(1, 4);
  c.head_dim = 8 * in(1, seed % 8 == 0 ? 32 : 16);
  const int batch = in(1, 3);
  c.rows.clear();
  c.counts.clear();
  for (int b = 0; b < batch; ++b) {
    c.rows.push_back(in(0, 3) == 0 ? in(0, 70) : 1);
    c.counts.push_back(in(0, 3) == 0 ? in(0, 1400) : in(0, 200));
  }
  c.live = in(0, 3) == 0 ? Live::kAll : Live::kMixed;
  c.dtype = dtype;
  return c;
}

TEST(AttentionDecode, IsAtMostTwiceAsWrongAsThePlainOneOnRandomProblems) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (uint64_t first = 100; first < 130; first += 10) {
      std::vector<DecodeCase> cases;
      for (uint64_t seed = first; seed < first + 10; ++seed) {
        cases.push_back(random_decode_case(seed, dtype));
      }
      expect_right(cases);
    }
  }
}

TEST(AttentionDecode, DoesNotDependOnTheWorkers) {
  const DecodeCase c{"workers", 7, 6, 2, 64, {1, 40, 3}, {3000, 500, 1}};
  const DecodeResult one = run_decode(c, kernels::cpu::run);
  for (const int threads : {2, 3, 8}) {
    const DecodeResult many = run_decode(c, kernels::cpu::run, plain_threads(threads));
    EXPECT_EQ(one.out, many.out);
    EXPECT_EQ(one.lse, many.lse);
    EXPECT_EQ(one.mass, many.mass);
  }
}

TEST(AttentionDecode, OfASequenceDoesNotDependOnItsNeighbours) {
  DecodeProblem together({"together", 9, 4, 2, 32, {1, 5}, {1500, 90}});
  kernels::cpu::run(together.params);
  const int64_t first = int64_t{4} * 32;  // elements of the first sequence's one row
  std::vector<float> all(first + 5 * first);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i] = static_cast<float>(kernels::load(together.out.data(), DType::kFloat32, i));
  }
  // The second sequence alone, over the same memory.
  AttentionDecode alone = together.params;
  const std::vector<int32_t> row_start{0, 5};
  std::vector<float> out(5 * first, kNaN);
  alone.batch = 1;
  alone.rows = 5;
  alone.row_start = row_start.data();
  alone.row_position = together.row_position.data() + 1;
  alone.q = static_cast<const float*>(alone.q) + first;
  alone.keys += 2;
  alone.out = out.data();
  alone.lse = nullptr;
  kernels::cpu::run(alone);
  EXPECT_EQ(out, std::vector<float>(all.begin() + first, all.end()));
}

TEST(AttentionDecode, KeepsInfinitiesAndNaNOfVisibleKeysAndIgnoresThoseOfHiddenOnes) {
  for (const float bad : {kNaN, std::numeric_limits<float>::infinity()}) {
    for (const bool in_key : {true, false}) {
      DecodeCase c{"poison", 21, 2, 1, 16, {12}, {90}, Live::kAll};
      DecodeProblem truth(c), fast(c);
      for (DecodeProblem* problem : {&truth, &fast}) {
        // Readable by the first four of the twelve queries.
        problem->last[0][70] = problem->row_position[3];
        const int64_t at = in_key ? int64_t{3} * kPageKeys + 6 : int64_t{kPageKeys + 6} * 16 + 3;
        kernels::store(const_cast<void*>(problem->tables[0][1]), c.dtype, at, bad);
      }
      kernels::reference::run(truth.params);
      kernels::cpu::run(fast.params);
      for (int64_t i = 0; i < int64_t{12} * 2 * 16; ++i) {
        const double a = kernels::load(truth.out.data(), c.dtype, i);
        const double b = kernels::load(fast.out.data(), c.dtype, i);
        EXPECT_EQ(std::isnan(a), std::isnan(b)) << "element " << i;
        EXPECT_EQ(std::isinf(a), std::isinf(b)) << "element " << i;
        if (std::isfinite(a)) {
          EXPECT_NEAR(a, b, 1e-5) << "element " << i;
        }
      }
    }
  }
}

TEST(AttentionDecode, SaysWhyItDoesNotSupportAHeadSize) {
  AttentionDecode p;
  p.q_heads = p.kv_heads = 1;
  for (const int head_dim : {8, 40, 256}) {
    p.head_dim = head_dim;
    EXPECT_EQ(kernels::cpu::why_not(p), "");
  }
  for (const int head_dim : {0, 4, 12, 264}) {
    p.head_dim = head_dim;
    EXPECT_NE(kernels::cpu::why_not(p), "") << head_dim;
  }
  p.head_dim = 8;
  p.kv_heads = 2;
  p.q_heads = 3;
  EXPECT_NE(kernels::cpu::why_not(p), "");
}

}  // namespace
}  // namespace natslm::test
