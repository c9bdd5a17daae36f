// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "natslm/base/atomic_file.h"
#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/train/checksum.h"
#include "tests/train/tiny_run.h"

namespace natslm::train {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::ThrowsMessage;

const Checkpoints::WriteFiles kTwoFiles = [](const fs::path& folder) {
  write_atomically(folder / "a", std::string(5000, 'a'));
  write_atomically(folder / "b", "bbb");
};

TEST(Checksum, ChangesWithEveryBitAndEveryLength) {
  std::string bytes(100, 'x');
  std::set<uint64_t> seen = {checksum(bytes)};
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_TRUE(seen.insert(checksum(flipped)).second) << "bit " << bit;
  }
  for (size_t size = 0; size < bytes.size(); ++size)
    EXPECT_TRUE(seen.insert(checksum(bytes.substr(0, size))).second) << "length " << size;
  for (const size_t at : {0, 32, 64, 99}) {
    std::string moved = bytes;
    moved[at] = 'q';
    EXPECT_TRUE(seen.insert(checksum(moved)).second) << "the place matters: " << at;
  }
}

TEST(Checkpoints, KeepTheNewestAndPointToIt) {
  const ScratchFolder folder;
  Checkpoints checkpoints(folder.path() / "c", 2);
  EXPECT_TRUE(checkpoints.latest().empty());
  for (const int64_t step : {5, 10, 100, 1'000'000})
    checkpoints.save(step, {{"step", step}}, kTwoFiles);
  EXPECT_THAT(names_in(folder.path() / "c"), ElementsAre("latest", "step-000100", "step-1000000"));
  EXPECT_EQ(checkpoints.latest().filename(), "step-1000000");
  EXPECT_EQ(open_checkpoint(checkpoints.latest())["step"], 1'000'000);
}

TEST(Checkpoints, WithoutAUsablePointerTheNewestCounts) {
  const ScratchFolder folder;
  Checkpoints checkpoints(folder.path(), 3);
  for (const int64_t step : {1, 2, 10}) checkpoints.save(step, {}, kTwoFiles);
  checkpoints.set_latest(folder.path() / "step-000002");
  EXPECT_EQ(checkpoints.latest().filename(), "step-000002");
  for (const char* damage : {"", "step-000007\n", "../x", "\xff\n", "latest"}) {
    write_atomically(folder.path() / "latest", damage);
    EXPECT_EQ(checkpoints.latest().filename(), "step-000010") << damage;
  }
  fs::remove(folder.path() / "latest");
  EXPECT_EQ(checkpoints.latest().filename(), "step-000010");
}

TEST(Checkpoints, AnotherOneOfTheSameStepReplacesIt) {
  const ScratchFolder folder;
  Checkpoints checkpoints(folder.path(), 2);
  checkpoints.save(1, {{"n", 1}}, kTwoFiles);
  checkpoints.save(1, {{"n", 2}}, kTwoFiles);
  EXPECT_EQ(open_checkpoint(checkpoints.latest())["n"], 2);
  EXPECT_THAT(names_in(folder.path()), ElementsAre("latest", "step-000001"));
}

TEST(Checkpoints, AnErrorWhileWritingLeavesTheOldOnesAndNothingElse) {
  const ScratchFolder folder;
  Checkpoints checkpoints(folder.path(), 1);
  checkpoints.save(1, {{"n", 1}}, kTwoFiles);
  EXPECT_THROW(checkpoints.save(2, {},
                                [](const fs::path& f) {
                                  kTwoFiles(f);
                                  fail("no more");
                                }),
               Error);
  EXPECT_THAT(names_in(folder.path()), ElementsAre("latest", "step-000001"));
  EXPECT_EQ(open_checkpoint(checkpoints.latest())["n"], 1);
}

// Lets this process write files of at most so many bytes; more is an error, not a signal.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit = {bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_ = {};
  void (*handler_)(int);
};

TEST(Checkpoints, AWriteThatTheSystemRefusesIsAnErrorAtAnyByte) {
  const ScratchFolder folder;
  TinyRun run;
  run.options.checkpoint_every = 5;
  run.options.steps = 5;
  run.trainer(folder.path()).run();
  const fs::path checkpoints = folder.path() / "checkpoints";
  const auto largest = fs::file_size(checkpoints / "step-000005" / "optimizer.safetensors");
  for (const rlim_t limit : {rlim_t{0}, rlim_t{1}, rlim_t{700}, rlim_t{largest - 1}}) {
    Checkpoints again(checkpoints, 1);
    {
      const FileSizeLimit limited(limit);
      EXPECT_THAT(
          [&] {
            again.save(10, {}, [&](const fs::path& f) {
              write_atomically(f / "weights", std::string(largest, 'w'));
            });
          },
          ThrowsMessage<Error>(AllOf(HasSubstr("cannot write"), HasSubstr("weights"))))
          << "limit " << limit;
    }
    EXPECT_THAT(names_in(checkpoints), ElementsAre("latest", "step-000005"));
    EXPECT_NO_THROW(open_checkpoint(again.latest()));
  }
}

TEST(Checkpoints, ADamagedOneIsRefusedAndAWholeOneOffered) {
  const ScratchFolder folder;
  TinyRun run;
  run.options.checkpoint_every = 5;
  run.options.steps = 10;
  run.trainer(folder.path()).run();
  const fs::path damaged = folder.path() / "checkpoints" / "step-000010";
  const fs::path whole = folder.path() / "checkpoints" / "step-000005";
  const auto reason = [&] {
    try {
      TinyRun other;
      other.options = run.options;
      other.trainer(folder.path()).resume(damaged);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  for (const char* name :
       {"model.safetensors", "optimizer.safetensors", "config.json", "trainer.json"}) {
    const fs::path file = damaged / name;
    const std::string bytes = read_file(file);
    std::vector<std::string> broken = {bytes.substr(0, bytes.size() / 2), ""};
    for (uint64_t i = 0; i < 40; ++i) {
      broken.push_back(bytes);
      char& byte = broken.back()[mix64(i) % bytes.size()];
      byte = static_cast<char>(byte ^ (1 << (mix64(i + 1000) % 8)));
    }
    for (const std::string& content : broken) {
      std::ofstream(file, std::ios::binary) << content;
      const std::string message = reason();
      // In trainer.json a flipped bit may change nothing but white space.
      if (message == "accepted" && file.filename() == "trainer.json") continue;
      ASSERT_THAT(message, AllOf(HasSubstr(name), HasSubstr("is damaged"),
                                 HasSubstr("--resume " + whole.string()), Not(HasSubstr("\n"))));
    }
    fs::remove(file);
    EXPECT_THAT(reason(), AllOf(HasSubstr(name), HasSubstr("--resume " + whole.string())));
    std::ofstream(file, std::ios::binary) << bytes;
    EXPECT_EQ(reason(), "accepted") << "put back as it was";
  }
  fs::remove_all(whole);
  fs::remove(damaged / "config.json");
  EXPECT_THAT(reason(), HasSubstr("no other whole checkpoint"));
}

}  // namespace
}  // namespace natslm::train
