// The parts every command shares: tables, progress, JSON lines, the interrupt flag.
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/error.h"
#include "natslm/cli/interrupt.h"
#include "natslm/cli/json_lines.h"
#include "natslm/cli/progress.h"
#include "natslm/cli/table.h"
#include "natslm/cli/terminal.h"
#include "tests/cli/program.h"

namespace natslm::cli {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(Table, PutsNumbersToTheRightAndWordsToTheLeft) {
  Table table({"policy", "perplexity"});
  table.add({"full", "9.5"});
  table.add({"streaming", "10.25"});
  EXPECT_EQ(table.text(),
            "policy     perplexity\n"
            "---------  ----------\n"
            "full              9.5\n"
            "streaming       10.25\n");
}

TEST(Table, CountsLettersAndNotBytes) {
  Table table({"a", "b"});
  table.add({"é", "x"});
  table.add({"ee", "x"});
  EXPECT_EQ(table.text(), "a   b\n--  -\né   x\nee  x\n");
}

TEST(Units, AreWhatPeopleRead) {
  EXPECT_EQ(bytes(0), "0 B");
  EXPECT_EQ(bytes(1023), "1023 B");
  EXPECT_EQ(bytes(1536), "1.5 KiB");
  EXPECT_EQ(bytes(int64_t{5} << 30), "5.0 GiB");
  EXPECT_EQ(percent(0.1234), "12.3 %");
  EXPECT_EQ(duration(0.25), "0.2 s");
  EXPECT_EQ(duration(75), "1 min 15 s");
  EXPECT_EQ(duration(7260), "2 h 1 min");
}

// Everything a Progress wrote to a file.
std::string drawn(const Terminal& terminal, const std::function<void(Progress&)>& use) {
  const test::ScratchFolder scratch;
  std::FILE* stream = std::fopen((scratch / "log").c_str(), "w");
  {
    Progress progress("train", 10, stream, terminal);
    use(progress);
  }
  std::fclose(stream);
  return test::read_file(scratch / "log");
}

TEST(Progress, IsPlainLinesWithoutATerminal) {
  const std::string text = drawn({.interactive = false}, [](Progress& progress) {
    for (int step = 1; step <= 10; ++step) progress.update(step, "loss 3.00");
  });
  EXPECT_THAT(text, HasSubstr("train 10/10 in"));
  EXPECT_THAT(text, HasSubstr("loss 3.00\n"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  EXPECT_EQ(test::lines_of(text).size(), 1u) << "ten steps in no time are one line: " << text;
}

TEST(Progress, IsABarThatFitsTheTerminal) {
  const std::string text =
      drawn({.interactive = true, .colour = false, .width = 40}, [](Progress& progress) {
        progress.update(5, "a very long note that would not fit in the line at all");
      });
  EXPECT_THAT(text, HasSubstr("[############............] 5/10"));
  for (const std::string& line : test::lines_of(text)) EXPECT_LE(line.size(), 40u + 4u) << line;
}

TEST(Progress, KeepsPrintedLinesWhole) {
  const std::string text = drawn({.interactive = true}, [](Progress& progress) {
    progress.update(1);
    progress.print("validation perplexity 12.5");
  });
  EXPECT_THAT(text, HasSubstr("\r\x1b[Kvalidation perplexity 12.5\n"));
}

TEST(Terminal, HasNoColourAndNoBarsInAFile) {
  const test::ScratchFolder scratch;
  std::FILE* file = std::fopen((scratch / "x").c_str(), "w");
  const Terminal terminal = terminal_of(fileno(file));
  std::fclose(file);
  EXPECT_FALSE(terminal.interactive);
  EXPECT_FALSE(terminal.colour);
}

TEST(JsonLines, IsOneObjectALineEvenForBrokenText) {
  const test::ScratchFolder scratch;
  JsonLines lines(scratch / "out.json");
  lines.write({{"text", "two\nlines"}});
  lines.write({{"text", "broken \xff utf-8"}});
  const auto written = test::lines_of(test::read_file(scratch / "out.json"));
  ASSERT_EQ(written.size(), 2u);
  EXPECT_EQ(nlohmann::json::parse(written[0])["text"], "two\nlines");
  EXPECT_EQ(nlohmann::json::parse(written[1])["text"], "broken \xEF\xBF\xBD utf-8");
}

TEST(JsonLines, SaysWhenTheDiskIsFull) {
  JsonLines lines("/dev/full");
  EXPECT_THROW(lines.write({{"x", 1}}), Error);
}

TEST(Interrupt, IsAFlagWhileAGuardLives) {
  EXPECT_FALSE(interrupted());
  {
    const InterruptGuard guard;
    throw_if_interrupted();
    std::raise(SIGINT);
    EXPECT_TRUE(interrupted());
    EXPECT_THROW(throw_if_interrupted(), Error);
  }
}

TEST(InterruptDeathTest, ASecondSignalEndsTheProgram) {
  EXPECT_EXIT(
      {
        const InterruptGuard guard;
        std::raise(SIGINT);
        std::raise(SIGINT);
      },
      testing::KilledBySignal(SIGINT), "");
}

}  // namespace
}  // namespace natslm::cli
