// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/atomic_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "natslm/base/error.h"
#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"

namespace natslm {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using testing::HasSubstr;

class AtomicFileTest : public testing::Test {
 protected:
  test::ScratchFolder scratch_;
  const fs::path folder_ = scratch_.path();
};

TEST_F(AtomicFileTest, NothingIsThereBeforeCommitAndAllOfItAfter) {
  const fs::path path = folder_ / "file";
  std::string large(5 << 20, 'x');
  {
    AtomicFile file(path);
    file.write("head");
    file.write(large);
    file.write("tail");
    file.overwrite(0, "HE", 2);
    EXPECT_EQ(file.written(), large.size() + 8);
    EXPECT_FALSE(fs::exists(path));
    file.commit();
  }
  EXPECT_EQ(read_file(path), "HEad" + large + "tail");
  EXPECT_FALSE(fs::exists(folder_ / "file.tmp"));
}

TEST_F(AtomicFileTest, WithoutCommitTheOldFileStays) {
  const fs::path path = folder_ / "file";
  write_atomically(path, "old");
  { AtomicFile(path).write("new"); }
  EXPECT_EQ(read_file(path), "old");
  EXPECT_FALSE(fs::exists(folder_ / "file.tmp"));
  write_atomically(path, "new");
  EXPECT_EQ(read_file(path), "new");
}

TEST_F(AtomicFileTest, AKilledWriterLeavesTheOldFileAndTheNextOneTakesOver) {
  const fs::path path = folder_ / "file";
  write_atomically(path, "old");
  const pid_t child = ::fork();
  if (child == 0) {
    AtomicFile file(path);
    file.write(std::string(3 << 20, 'n'));
    ::raise(SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(read_file(path), "old");
  EXPECT_TRUE(fs::exists(folder_ / "file.tmp"));
  write_atomically(path, "newer");
  EXPECT_EQ(read_file(path), "newer");
  EXPECT_FALSE(fs::exists(folder_ / "file.tmp"));
}

TEST_F(AtomicFileTest, ASecondWriterOfThePathIsRefused) {
  const fs::path path = folder_ / "file";
  AtomicFile first(path);
  EXPECT_THAT(error_of([&] { AtomicFile{path}; }), HasSubstr("another process is writing it"));
  first.write("first");
  first.commit();
  EXPECT_EQ(read_file(path), "first");
}

TEST_F(AtomicFileTest, AFullDiskIsReportedWithThePathAndTheOldFileStays) {
  const fs::path path = folder_ / "file";
  write_atomically(path, "old");
  // A limit on file sizes stands for the full disk: write() fails in the same place.
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1 << 20, 1 << 20};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string error = error_of([&] { write_atomically(path, std::string(4 << 20, 'n')); });
    const bool clean = !fs::exists(path.string() + ".tmp");
    ::_exit(clean && error.find(path.string()) != std::string::npos ? 7 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(read_file(path), "old");
}

TEST_F(AtomicFileTest, ALinkIsFollowedAndOddTargetsAreRefused) {
  write_atomically(folder_ / "target", "old");
  fs::create_symlink(folder_ / "target", folder_ / "link");
  write_atomically(folder_ / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder_ / "link"));
  EXPECT_EQ(read_file(folder_ / "target"), "new");
  EXPECT_THAT(error_of([&] { AtomicFile{folder_}; }), HasSubstr("not a regular file"));
  EXPECT_THAT(error_of([&] { AtomicFile{"/dev/null"}; }), HasSubstr("not a regular file"));
  EXPECT_THAT(error_of([&] { AtomicFile{folder_ / "none" / "file"}; }),
              HasSubstr("does its folder exist?"));
  EXPECT_THAT(error_of([&] { read_file(folder_); }), HasSubstr("it is a folder"));
  EXPECT_THAT(error_of([&] { read_file(folder_ / "none"); }), HasSubstr("none"));
}

TEST_F(AtomicFileTest, AFolderIsRenamedOverAnEmptyOneOnly) {
  fs::create_directories(folder_ / "a.tmp" / "inner");
  write_atomically(folder_ / "a.tmp" / "inner" / "file", "x");
  sync_tree(folder_ / "a.tmp");
  rename_durably(folder_ / "a.tmp", folder_ / "a");
  EXPECT_EQ(read_file(folder_ / "a" / "inner" / "file"), "x");
  fs::create_directories(folder_ / "b");
  EXPECT_THAT(error_of([&] { rename_durably(folder_ / "b", folder_ / "a"); }),
              HasSubstr("cannot rename"));
}

}  // namespace
}  // namespace natslm
