// Runs that are killed, in a process of their own, and continued.
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "natslm/base/atomic_file.h"
#include "natslm/base/counter_rng.h"
#include "tests/train/tiny_run.h"

namespace natslm::train {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;

struct Ended {
  bool killed = false;
  int code = 0;
};
// Runs the driver, and kills it after that time unless it is 0.
Ended drive(const fs::path& folder, const std::string& stage, int count,
            std::chrono::microseconds kill_after = std::chrono::microseconds(0)) {
  const std::string number = std::to_string(count);
  const pid_t child = ::fork();
  if (child == 0) {
    ::execl(NATSLM_RUN_DRIVER, NATSLM_RUN_DRIVER, folder.c_str(), stage.c_str(), number.c_str(),
            static_cast<char*>(nullptr));
    ::_exit(127);
  }
  if (kill_after.count() > 0) {
    std::this_thread::sleep_for(kill_after);
    ::kill(child, SIGKILL);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return {WIFSIGNALED(status), WIFEXITED(status) ? WEXITSTATUS(status) : -1};
}

class KilledRun : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const ScratchFolder folder;
    ASSERT_EQ(drive(folder.path(), "never", 1).code, 0);
    truth_ = read_file(folder.path() / "final.safetensors");
    optimizer_ = read_file(folder.path() / "checkpoints/step-000040/optimizer.safetensors");
  }
  // Continues the run to its end and compares with the one that was never killed.
  static void expect_same_end(const fs::path& folder, const std::string& what) {
    ASSERT_EQ(drive(folder, "never", 1).code, 0) << what;
    EXPECT_EQ(read_file(folder / "final.safetensors"), truth_) << what;
    EXPECT_EQ(read_file(folder / "checkpoints/step-000040/optimizer.safetensors"), optimizer_)
        << what;
    EXPECT_THAT(names_in(folder / "checkpoints"),
                ElementsAre("latest", "step-000039", "step-000040"))
        << what << ": something half-written stayed";
  }
  static inline std::string truth_, optimizer_;
};

TEST_F(KilledRun, AtEachStageOfASaveContinuesToTheSameBits) {
  for (const char* stage : {"begun", "files written", "state written", "synced", "old one aside",
                            "renamed", "pointer written", "renamed old ones", "pruned"}) {
    for (const int count : {1, 3}) {
      const ScratchFolder folder;
      const std::string what =
          std::string("killed at '") + stage + "', save " + std::to_string(count);
      ASSERT_TRUE(drive(folder.path(), stage, count).killed) << what;
      expect_same_end(folder.path(), what);
    }
  }
}

TEST_F(KilledRun, TwiceAtTheSameSaveContinuesToTheSameBits) {
  const ScratchFolder folder;
  ASSERT_TRUE(drive(folder.path(), "renamed", 2).killed);  // step 6 is whole, the pointer at step 3
  ASSERT_TRUE(drive(folder.path(), "old one aside", 1).killed);  // while step 6 is replaced
  expect_same_end(folder.path(), "killed twice");
}

TEST_F(KilledRun, AtRandomMomentsContinuesToTheSameBits) {
  const auto begin = std::chrono::steady_clock::now();
  {
    const ScratchFolder folder;
    drive(folder.path(), "never", 1);
  }
  const auto whole = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - begin);
  const ScratchFolder folder;
  for (uint64_t i = 0; i < 8; ++i) {
    const auto moment = whole * static_cast<int64_t>(30 + mix64(i) % 70) / 100;
    SCOPED_TRACE("kill " + std::to_string(i) + " after " + std::to_string(moment.count()) + " us");
    const Ended ended = drive(folder.path(), "never", 1, moment);
    ASSERT_TRUE(ended.killed || ended.code == 0);
  }
  expect_same_end(folder.path(), "killed at random");
}

}  // namespace
}  // namespace natslm::train
