// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

namespace natslm {
namespace {

TEST(ParallelFor, RunsEveryTaskOnceWithAWorkerNumberInRange) {
  for (const int threads : {0, 1, 2, 5}) {
    const ParallelFor parallel = plain_threads(threads);
    std::vector<std::atomic<int>> runs(100);
    std::atomic<bool> in_range = true;
    parallel(100, [&](int64_t task, int worker) {
      ++runs[task];
      if (worker < 0 || worker >= parallel.workers) in_range = false;
    });
    for (const auto& count : runs) EXPECT_EQ(count, 1) << threads << " threads";
    EXPECT_TRUE(in_range);
  }
}

TEST(ParallelFor, TasksOfOneWorkerDoNotOverlap) {
  const ParallelFor parallel = plain_threads(3);
  std::vector<std::atomic<int>> inside(parallel.workers);
  std::atomic<bool> overlap = false;
  parallel(300, [&](int64_t, int worker) {
    if (++inside[worker] != 1) overlap = true;
    --inside[worker];
  });
  EXPECT_FALSE(overlap);
}

TEST(ParallelFor, NoTaskIsNoCall) {
  for (const ParallelFor& parallel : {serial(), plain_threads(3)}) {
    parallel(0, [](int64_t, int) { FAIL() << "a task where there is none"; });
  }
}

TEST(ParallelFor, AnExceptionReachesTheCaller) {
  for (const ParallelFor& parallel : {serial(), plain_threads(3)}) {
    EXPECT_THROW(parallel(50,
                          [](int64_t task, int) {
                            if (task == 7) throw std::runtime_error("seven");
                          }),
                 std::runtime_error);
  }
}

}  // namespace
}  // namespace natslm
