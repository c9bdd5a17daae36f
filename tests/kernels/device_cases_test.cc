// What the tests of GPU kernels stand on.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "natslm/base/error.h"
#include "tests/kernels/gpu_attention_cases.h"
#include "tests/support/device_attention.h"
#include "tests/support/isolated.h"

namespace natslm::test {
namespace {

TEST(DeviceCases, EveryVisibleKeyIsInTheOrderOnceAndItsSegmentIsSorted) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const AttentionCase c = random_problem(seed).problem;
    const AttentionInputs in(c);
    for (const int32_t brief : {-1, 0, c.window}) {
      const HostKeyOrder order = order_keys(c, in.last, in.lengths, brief);
      for (int64_t head = 0; head < int64_t{c.batch} * c.kv_heads; ++head) {
        const int length = in.lengths.empty() ? c.tokens : in.lengths[head / c.kv_heads];
        const int32_t* keys = &order.order[head * c.tokens];
        const int32_t* last = &in.last[head * c.tokens];
        const int32_t* ends = &order.ends[head * 3];
        ASSERT_EQ(ends[2], length);
        EXPECT_EQ(std::set<int32_t>(keys, keys + length).size(), length);
        for (int place = 1; place < length; ++place) {
          const bool same_segment = std::count(ends, ends + 3, place) == 0;
          if (!same_segment) continue;
          EXPECT_LT(keys[place - 1], keys[place]);
          EXPECT_TRUE(place >= ends[1] || last[keys[place - 1]] <= last[keys[place]]);
        }
        for (int place = ends[1]; place < length; ++place) {
          EXPECT_LE(int64_t{last[keys[place]]}, int64_t{keys[place]} + order.reach);
        }
      }
    }
  }
}

TEST(DeviceCases, TheComparisonNamesWrongRowsAndColumns) {
  Expected e{"x", DType::kFloat32, 2, 100, 8, std::vector<double>(1600, 1.0), {}};
  e.plain = {e.truth};
  EXPECT_EQ(compare(e, e.truth), "");
  std::vector<double> got = e.truth;
  for (int row = 164; row < 170; ++row) got[row * 8 + 3] = 0;  // head 1, rows 64 to 69
  const std::string text = compare(e, got);
  EXPECT_NE(text.find("6 of 1600 wrong (0 NaN, 6 zero) in 6 rows"), std::string::npos) << text;
  EXPECT_NE(text.find("heads 1 | rows 64-69 | rows % 64: 0-5 | columns 3"), std::string::npos)
      << text;
  got[0] = NAN;
  EXPECT_NE(compare(e, got).find("1 NaN"), std::string::npos);
}

TEST(DeviceCases, AWriteOutsideAnArrayShows) {
  const auto memory = host_memory();
  GuardedArray array(*memory, 10, 0xff);
  EXPECT_TRUE(array.guards_are_intact());
  array.as<uint8_t>()[10] = 1;
  EXPECT_FALSE(array.guards_are_intact());
  array.as<uint8_t>()[10] = array.as<uint8_t>()[11];
  EXPECT_TRUE(array.guards_are_intact());
  array.as<uint8_t>()[-1] = 1;
  EXPECT_FALSE(array.guards_are_intact());
}

TEST(DeviceCases, AWriteBetweenRowsOrIntoAnInputShows) {
  AttentionCase c = simple_case("token-major", Lifetimes::kRoles, 10, 64);
  c.token_major = true;
  const DeviceProblem problem(c);
  AttentionBackend broken = kCpuBackend;
  const auto damage = [&] {
    const auto memory = host_memory();
    return run_forward(problem, *memory, broken).damage;
  };
  EXPECT_EQ(damage(), "");
  broken.forward = [](const kernels::AttentionForward& p, CUstream_st*) {
    static_cast<BFloat16*>(p.out)[p.head_dim] = BFloat16(0.0f);
  };
  EXPECT_EQ(damage(), " 2 bytes between rows of out were written;");
  broken.forward = [](const kernels::AttentionForward& p, CUstream_st*) {
    const_cast<int32_t*>(p.last)[3] = 7;
  };
  EXPECT_EQ(damage(), " input last was written;");
}

TEST(DeviceCases, AChildThatDiesOrHangsIsNamed) {
  const IsolatedResult died = run_isolated(
      [](Messages& messages) {
        messages.doing("the first");
        messages.note("a note");
        std::_Exit(3);
      },
      10);
  ASSERT_EQ(died.failures.size(), 1u);
  EXPECT_EQ(died.failures[0], "DIED (exit 3) at: the first");
  EXPECT_EQ(died.notes, std::vector<std::string>{"a note"});
  const IsolatedResult hung = run_isolated(
      [](Messages& messages) {
        messages.doing("waiting");
        std::this_thread::sleep_for(std::chrono::hours(1));
      },
      1);
  ASSERT_EQ(hung.failures.size(), 1u);
  EXPECT_EQ(hung.failures[0], "HUNG for 1 s at: waiting");
  const IsolatedResult threw = run_isolated([](Messages&) { fail("no"); }, 10);
  EXPECT_TRUE(threw.ended);
  EXPECT_EQ(threw.failures, std::vector<std::string>{"no\n  last at: starting"});
}

TEST(DeviceCases, AMatrixUnitCutsWhatIsFarBelowTheLargestTerm) {
  std::vector<float> a(16, 0), b(16, 1);
  a[0] = 1;
  a[1] = 0x1p-24f;
  a[2] = 0x1p-25f;
  EXPECT_EQ(matrix_unit_dot(a.data(), b.data(), 16), 1.0f);  // 1 + 2^-24, cut to a float
  a[3] = 0x1p-23f;
  EXPECT_EQ(matrix_unit_dot(a.data(), b.data(), 16), 1.0f + 0x1p-23f);
  a[0] = -1;
  EXPECT_EQ(matrix_unit_dot(a.data(), b.data(), 16), -(1.0f - 3 * 0x1p-24f));
}

}  // namespace
}  // namespace natslm::test
