// What tests of a command share: a folder for the files of a suite, the JSON that the command wrote
// there, and what an error looks like.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/cli/program.h"

namespace natslm::test {

class CommandTest : public ::testing::Test {
 protected:
  // A suite that fills the folder has a SetUpTestSuite() of its own, which calls this one first.
  static void SetUpTestSuite() { scratch_ = std::make_unique<ScratchFolder>(); }
  static void TearDownTestSuite() { scratch_.reset(); }

  static std::string path(const std::string& name) { return (*scratch_ / name).string(); }
  static std::vector<nlohmann::json> json_lines(const std::string& name) {
    std::vector<nlohmann::json> lines;
    for (const std::string& line : lines_of(read_file(path(name)))) {
      lines.push_back(nlohmann::json::parse(line));
    }
    return lines;
  }
  // The command ended so and wrote one line to standard error.
  static void expect_error(const Outcome& outcome, int exit_code, const std::string& says) {
    EXPECT_EQ(outcome.exit_code, exit_code) << outcome.err;
    EXPECT_THAT(outcome.err, ::testing::HasSubstr(says));
    EXPECT_EQ(lines_of(outcome.err).size(), 1u) << outcome.err;
  }

  static inline std::unique_ptr<ScratchFolder> scratch_;
};

}  // namespace natslm::test
