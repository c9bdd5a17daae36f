// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/cli/command_test.h"
#include "tests/cli/program.h"
#include "tests/cli/random_model.h"

namespace natslm::test {
namespace {

using ::testing::HasSubstr;

class EvalRecall : public CommandTest {
 protected:
  static void SetUpTestSuite() {
    CommandTest::SetUpTestSuite();
    write_model(*scratch_ / "model", {.context = 1024});
    write_file(*scratch_ / "text.txt", sample_text());
    write_file(*scratch_ / "short.txt", sample_text().substr(0, 500));
  }

  static Outcome run(const std::string& task, const std::vector<std::string>& more,
                     const std::string& text = "text.txt") {
    std::vector<std::string> arguments{"eval",        task,     "--model",
                                       path("model"), "--text", path(text)};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  }
  static std::vector<nlohmann::json> results(const std::string& task,
                                             const std::vector<std::string>& more) {
    std::vector<std::string> arguments = more;
    arguments.insert(arguments.end(), {"--json", path("out.json")});
    const Outcome outcome = run(task, arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return json_lines("out.json");
  }
  static void expect_fields(const nlohmann::json& line, const std::string& task) {
    EXPECT_EQ(line["command"], "eval " + task);
    const nlohmann::json& r = line["results"];
    EXPECT_EQ(r["task"], task);
    for (const char* field : {"policy", "model", "score", "n", "stderr", "kv_end", "kv_mean",
                              "kv_bytes_mean", "kv_bytes_peak", "seconds"}) {
      EXPECT_TRUE(r.contains(field)) << field;
    }
  }
};

TEST_F(EvalRecall, FactsAreAskedForAndCounted) {
  const auto lines = results("facts", {"--samples", "3", "--facts", "3", "--ask", "2", "--policy",
                                       "full", "--policy", "streaming:sinks=2,window=62"});
  ASSERT_EQ(lines.size(), 2u);
  for (const nlohmann::json& line : lines) {
    expect_fields(line, "facts");
    EXPECT_EQ(line["results"]["n"], 6);
    EXPECT_EQ(line["seed"], 1);
  }
  EXPECT_EQ(lines[0]["results"]["kv_end"], 1);
  EXPECT_LT(lines[1]["results"]["kv_end"], 0.07);
}

TEST_F(EvalRecall, TheDefaultAsksFourOfEightFacts) {
  const Outcome outcome = run("facts", {"--samples", "1", "--show-answers"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("4 questions, 4 of 8 facts in each of 1 text of 1024 tokens"));
  int shown = 0;
  for (const std::string& line : lines_of(outcome.err)) {
    shown += line.starts_with("right  ") || line.starts_with("wrong  ") ? 1 : 0;
  }
  EXPECT_EQ(shown, 4);
}

TEST_F(EvalRecall, OnlyRepeatedTokensAreScored) {
  const auto lines = results("repeat", {"--samples", "2", "--context", "512", "--policy", "full",
                                        "--policy", "streaming:sinks=2,window=62"});
  ASSERT_EQ(lines.size(), 2u);
  for (const nlohmann::json& line : lines) {
    expect_fields(line, "repeat");
    EXPECT_EQ(line["results"]["n"], 2);
    EXPECT_EQ(line["results"]["tokens"], 2 * 128);  // a quarter of the window at most
    EXPECT_NEAR(std::exp(line["results"]["nll"].get<double>()),
                line["results"]["score"].get<double>(), 1e-6);
  }
  EXPECT_EQ(lines[0]["results"]["kv_end"], 1);
  EXPECT_NEAR(lines[1]["results"]["kv_end"].get<double>(), 64.0 / 512, 1e-9);
  EXPECT_NE(lines[0]["results"]["nll"], lines[1]["results"]["nll"]);
}

TEST_F(EvalRecall, TheSameSeedGivesTheSame) {
  for (const char* task : {"repeat", "facts"}) {
    const std::vector<std::string> arguments{"--samples", "1", "--context", "900"};
    auto seeded = arguments;
    seeded.insert(seeded.end(), {"--seed", "2"});
    const auto a = results(task, arguments)[0]["results"],
               b = results(task, arguments)[0]["results"], c = results(task, seeded)[0]["results"];
    for (const char* field : {"score", "kv_end", "kv_mean", "kv_bytes_mean"}) {
      EXPECT_EQ(a[field], b[field]) << task << " " << field;
    }
    EXPECT_NE(a["kv_mean"], c["kv_mean"]) << task;
  }
}

TEST_F(EvalRecall, AtEqualBudgetRivalsKeepTheLearnedShareOfKeys) {
  for (const char* task : {"repeat", "facts"}) {
    const auto lines = results(task, {"--samples", "2", "--context", "900", "--equal-budget",
                                      "--kv-budget", "0.3", "--policy", "streaming"});
    ASSERT_EQ(lines.size(), 3u);
    EXPECT_EQ(lines[0]["results"]["policy"], "full");
    EXPECT_TRUE(lines[1]["results"]["policy"].get<std::string>().starts_with("learned"));
    EXPECT_NEAR(lines[1]["results"]["kv_end"].get<double>(), 0.3, 0.03) << task;
    EXPECT_NEAR(lines[2]["results"]["kv_end"].get<double>(),
                lines[1]["results"]["kv_end"].get<double>(), 0.01)
        << task;
  }
}

TEST_F(EvalRecall, ABudgetOfLearnedRolesIsNeverPassed) {
  for (const char* task : {"repeat", "facts"}) {
    const auto r = results(task, {"--samples", "1", "--context", "900", "--policy",
                                  "learned:bias=-9", "--kv-budget", "0.2"})[0]["results"];
    EXPECT_GT(r["demoted"].get<int64_t>(), 0) << task;
    EXPECT_GT(r["kv_peak_over_cap"].get<double>(), 0.9) << task;
    EXPECT_LE(r["kv_peak_over_cap"].get<double>(), 1) << task;
  }
}

TEST_F(EvalRecall, InputThatCannotWorkGetsOneClearLine) {
  expect_error(run("facts", {}, "short.txt"), 1, "short.txt has");
  expect_error(run("repeat", {}, "short.txt"), 1, "give more text or a shorter context");
  expect_error(run("facts", {"--context", "200"}), 1, "give a longer context or fewer facts");
  expect_error(run("facts", {"--facts", "2", "--ask", "3"}), 1,
               "3 questions cannot be asked about 2 facts");
  expect_error(run("repeat", {"--context", "16"}), 1, "too short to repeat");
  expect_error(run("repeat", {"--context", "2000", "--policy", "full"}), 1,
               "longer than the context this model was built for (1024)");
  expect_error(run("facts", {"--facts", "33"}), 2, "--facts");
  expect_error(run("repeat", {"--samples", "0"}), 2, "--samples");
  expect_error(run("facts", {"--policy", "nothing"}), 1, "unknown policy \"nothing\"");
}

}  // namespace
}  // namespace natslm::test
