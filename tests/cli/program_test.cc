// The program as a user meets it: help, wrong usage, exit codes, JSON lines.
// SPDX-License-Identifier: Apache-2.0
#include "tests/cli/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace natslm::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

using Words = std::vector<std::string>;

std::string joined(const Words& words) {
  std::string text = "nats-lm";
  for (const std::string& word : words) text += " " + word;
  return text;
}

// Names under "Subcommands:" in a help text.
Words commands_in(const std::string& help) {
  Words names;
  bool inside = false;
  for (const std::string& line : lines_of(help)) {
    if (inside && line.starts_with("  ") && line.size() > 2 && line[2] != ' ') {
      names.push_back(line.substr(2, line.find(' ', 2) - 2));
    }
    inside = inside || line.starts_with("Subcommands:");
  }
  return names;
}

// Asks a command and all commands below it for help; returns how many there are.
int check_help(const Words& command) {
  Words words = command;
  words.push_back("--help");
  const Outcome outcome = run_program(words);
  EXPECT_EQ(outcome.exit_code, 0) << joined(words);
  EXPECT_THAT(outcome.err, IsEmpty()) << joined(words);
  const Words children = commands_in(outcome.out);
  if (children.empty()) {
    EXPECT_THAT(outcome.out, AllOf(HasSubstr("--json FILE"), HasSubstr("--threads")))
        << joined(words);
  }
  int count = 1;
  for (const std::string& child : children) {
    Words below = command;
    below.push_back(child);
    count += check_help(below);
  }
  return count;
}

TEST(Program, HelpsOnEveryCommandAndItsCommonOptions) {
  // The program itself, its commands, and those of bench and eval.
  EXPECT_GE(check_help({}), 1 + 7 + 5);
}

struct Misuse {
  Words arguments;
  std::string expected;
};

TEST(Program, AnswersWrongUsageWithOneLineAndExitCodeTwo) {
  const Misuse cases[] = {
      {{}, "a command is missing; there are"},
      {{"frobnicate"}, "unknown command 'frobnicate'; there are"},
      {{"bench"}, "a command is missing; there are attention"},
      {{"bench", "sorting"}, "unknown command 'sorting'; there are attention"},
      {{"--frobnicate"}, "unknown option '--frobnicate'"},
      {{"info", "--frobnicate"}, "(see nats-lm info --help)"},
      {{"info", "more"}, "more"},
      {{"info", "--threads", "many"}, "many"},
      {{"info", "--threads", "-1"}, "not in range"},
      {{"info", "--json"}, "--json"},
  };
  for (const Misuse& misuse : cases) {
    const Outcome outcome = run_program(misuse.arguments);
    EXPECT_EQ(outcome.exit_code, 2) << joined(misuse.arguments);
    EXPECT_THAT(outcome.err, HasSubstr(misuse.expected)) << joined(misuse.arguments);
    EXPECT_THAT(outcome.err, HasSubstr("--help")) << joined(misuse.arguments);
    EXPECT_EQ(lines_of(outcome.err).size(), 1u) << outcome.err;
    EXPECT_THAT(outcome.out, IsEmpty()) << joined(misuse.arguments);
  }
}

TEST(Program, AnswersAFailedRunWithOneLineAndExitCodeOne) {
  const Outcome outcome = run_program({"info", "--json", "/no/such/folder/out.json"});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(lines_of(outcome.err).size(), 1u) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("/no/such/folder/out.json"));
}

TEST(Program, SaysItsVersion) {
  const Outcome outcome = run_program({"--version"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, testing::MatchesRegex("[0-9]+\\.[0-9]+\\.[0-9]+ \\([0-9a-f+a-z]+\\)\n"));
}

TEST(Program, WritesJsonLinesWithWhatARunStandsFor) {
  const ScratchFolder scratch;
  const std::string file = (scratch / "out.json").string();
  ASSERT_EQ(run_program({"info", "--threads", "1", "--json", file}).exit_code, 0);
  const Words lines = lines_of(read_file(file));
  ASSERT_EQ(lines.size(), 1u);
  const auto line = nlohmann::json::parse(lines[0]);
  EXPECT_EQ(line["command"], "info");
  EXPECT_EQ(line["settings"]["threads"], 1);
  EXPECT_THAT(line["device"].get<std::string>(), HasSubstr("cpu, 1 thread,"));
  for (const char* field : {"version", "commit", "seed", "results"}) {
    EXPECT_TRUE(line.contains(field)) << field;
  }
}

}  // namespace
}  // namespace natslm::test
