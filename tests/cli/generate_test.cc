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
using ::testing::Not;

class Generate : public CommandTest {
 protected:
  static void SetUpTestSuite() {
    CommandTest::SetUpTestSuite();
    write_model(*scratch_ / "model");
    write_model(*scratch_ / "global", {.all_global = true});
    write_file(*scratch_ / "prompt.txt", sample_text().substr(0, 120));
    write_file(*scratch_ / "long.txt", sample_text());
  }
  static Outcome run(const std::vector<std::string>& more, const std::string& model = "model",
                     const std::string& input = "") {
    std::vector<std::string> arguments{"generate", "--model", path(model)};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments, input);
  }
  static nlohmann::json result(std::vector<std::string> more, const std::string& model = "model") {
    more.insert(more.end(), {"--json", path("out.json")});
    const Outcome outcome = run(more, model);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return json_lines("out.json").back()["results"];
  }
};

TEST_F(Generate, PrintsTheTextThenWhatItKept) {
  const Outcome outcome = run({"--prompt", "the next key", "--max-new-tokens", "12"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  EXPECT_THAT(lines_of(outcome.out).back(), HasSubstr("tokens alive"));
  EXPECT_THAT(lines_of(outcome.out).back(), HasSubstr("tokens/s"));
}

TEST_F(Generate, ThePromptComesFromOptionFileOrStandardInput) {
  const std::string prompt = read_file(path("prompt.txt"));
  const std::vector<std::string> more{"--max-new-tokens", "8"};
  const auto text = [](const Outcome& outcome) { return lines_of(outcome.out).front(); };
  const Outcome given = run({"--max-new-tokens", "8", "--prompt", prompt});
  EXPECT_EQ(text(run({"--max-new-tokens", "8", "--file", path("prompt.txt")})), text(given));
  EXPECT_EQ(text(run(more, "model", prompt)), text(given));
}

TEST_F(Generate, LearnedRolesThatAreAllGlobalGiveFullsTokensOneByOne) {
  for (const char* temperature : {"0", "1"}) {
    const std::vector<std::string> more{"--file", path("prompt.txt"), "--max-new-tokens",
                                        "40",     "--temperature",    temperature};
    auto learned = more, full = more;
    learned.insert(learned.end(), {"--policy", "learned"});
    full.insert(full.end(), {"--policy", "full"});
    const auto a = result(learned, "global"), b = result(full, "global");
    EXPECT_EQ(a["text"], b["text"]);
    EXPECT_EQ(a["kv_end"], 1);
    EXPECT_EQ(a["live_keys"], b["live_keys"]);
  }
}

TEST_F(Generate, TheSeedDecidesAndNothingElse) {
  const auto text = [&](const std::string& seed) {
    return result({"--prompt", "the next", "--max-new-tokens", "30", "--temperature", "1", "--seed",
                   seed})["text"];
  };
  EXPECT_EQ(text("5"), text("5"));
  EXPECT_NE(text("5"), text("6"));
}

TEST_F(Generate, ChunksOfThePromptChangeNothing) {
  const auto want = result({"--file", path("prompt.txt"), "--max-new-tokens", "20"});
  for (const char* chunk : {"1", "7"}) {
    const auto got =
        result({"--file", path("prompt.txt"), "--max-new-tokens", "20", "--prefill-chunk", chunk});
    EXPECT_EQ(got["text"], want["text"]);
    EXPECT_EQ(got["live_keys"], want["live_keys"]);
  }
}

TEST_F(Generate, EvictionIsReported) {
  const auto r = result({"--file", path("prompt.txt"), "--max-new-tokens", "40", "--policy",
                         "streaming:sinks=2,window=8"});
  const double tokens = r["prompt_tokens"].get<double>() + r["new_tokens"].get<double>() - 1;
  EXPECT_NEAR(r["kv_end"].get<double>(), 10 / tokens, 1e-9);
  EXPECT_EQ(r["live_keys"], (10 - 1) * 2 * 2);  // the next token takes the tenth place
}

TEST_F(Generate, ABudgetIsAShareOfPromptAndAnswer) {
  const auto r = result({"--file", path("prompt.txt"), "--max-new-tokens", "40", "--policy",
                         "streaming", "--kv-budget", "0.25"});
  EXPECT_NEAR(r["kv_end"].get<double>(), 0.25, 0.02);
}

TEST_F(Generate, LearnedRolesNeverPassTheirBudget) {
  const Outcome outcome = run({"--file", path("prompt.txt"), "--max-new-tokens", "40",
                               "--kv-budget", "0.4", "--json", path("out.json")});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto r = nlohmann::json::parse(read_file(path("out.json")))["results"];
  EXPECT_LE(r["kv_end"].get<double>(), 0.4);
  EXPECT_GT(r["kv_end"].get<double>(), 0.25);  // and make use of it
  EXPECT_LE(r["kv_peak_over_cap"].get<double>(), 1);
  EXPECT_GT(r["demoted"].get<int64_t>(), 0);
  EXPECT_EQ(lines_of(outcome.out).back(), r["demoted"].dump() + " keys demoted to keep the budget");
  const auto free = result({"--file", path("prompt.txt"), "--max-new-tokens", "40"});
  EXPECT_EQ(free["demoted"], 0);
  EXPECT_EQ(free["kv_peak_over_cap"], 0);
}

TEST_F(Generate, ABudgetInMebibytesBoundsTheKeys) {
  // A key of 8 channels and its value: 64 bytes in float32, 32 in bfloat16. 128 of them.
  for (const auto& [dtype, mebibytes] :
       {std::pair("float32", "0.0078125"), {"bfloat16", "0.00390625"}}) {
    const auto r = result({"--file", path("prompt.txt"), "--max-new-tokens", "40", "--policy",
                           "learned:bias=-9", "--cache-dtype", dtype, "--kv-mb", mebibytes});
    EXPECT_EQ(r["policy"], "learned:bias=-9,keys=128");
    EXPECT_LE(r["live_keys"].get<int64_t>(), 128);
    EXPECT_GT(r["live_keys"].get<int64_t>(), 64);
    EXPECT_LE(r["kv_peak_over_cap"].get<double>(), 1);
  }
  const auto streaming = result({"--file", path("prompt.txt"), "--max-new-tokens", "40", "--policy",
                                 "streaming", "--kv-mb", "0.0078125"});
  EXPECT_EQ(streaming["policy"], "streaming:sinks=4,window=28");  // in each of four heads
}

TEST_F(Generate, LifetimesAreDrawnWithPlainMarksWhereThereIsNoTerminal) {
  const Outcome outcome =
      run({"--file", path("prompt.txt"), "--max-new-tokens", "20", "--show-lifetimes"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("G/g Global"));
  EXPECT_THAT(outcome.out, HasSubstr("Alive at the end"));
  EXPECT_THAT(outcome.out, HasSubstr("layer  1"));
  EXPECT_THAT(outcome.out, Not(HasSubstr("\x1b")));
  const Outcome one = run({"--file", path("prompt.txt"), "--max-new-tokens", "20",
                           "--show-lifetimes", "--layer", "1", "--head", "0"});
  EXPECT_THAT(one.out, HasSubstr("layer 1, KV head 0"));
  expect_error(
      run({"--prompt", "the", "--max-new-tokens", "3", "--show-lifetimes", "--layer", "2"}), 1,
      "layers 0 to 1");
}

TEST_F(Generate, AStopTextEndsTheAnswerBeforeIt) {
  const auto all = result({"--prompt", "the next key", "--max-new-tokens", "40"});
  const std::string text = all["text"];
  ASSERT_GT(text.size(), 8u);
  const std::string stop = text.substr(4, 3);
  const auto stopped =
      result({"--prompt", "the next key", "--max-new-tokens", "40", "--stop", stop});
  EXPECT_EQ(stopped["text"], text.substr(0, text.find(stop)));
  EXPECT_EQ(stopped["finish"], "stop");
}

TEST_F(Generate, InputThatCannotWorkGetsOneClearLine) {
  expect_error(run({"--prompt", ""}), 1, "the prompt is empty");
  expect_error(run({}), 1, "the prompt is empty");  // nothing on standard input
  expect_error(run({"--file", path("long.txt")}), 1,
               "longer than the context this model was built for (128)");
  expect_error(run({"--prompt", "x", "--policy", "strict"}), 1, "unknown policy \"strict\"");
  expect_error(run({"--prompt", "x", "--kv-mb", "0.00001"}), 1, "holds 0 keys");
  expect_error(run({"--prompt", "x", "--kv-mb", "1", "--policy", "full"}), 1,
               "policy full has no key budget");
  expect_error(run({"--prompt", "x", "--kv-mb", "1", "--kv-budget", "0.1"}), 2, "excludes");
  expect_error(run({"--prompt", "x", "--kv-budget", "0.1", "--policy", "full"}), 1,
               "no key budget");
  expect_error(run({"--prompt", "x"}, "no such model"), 1, "is no model");
  expect_error(run({"--prompt", "x", "--temperature", "-1"}), 2, "--temperature");
  expect_error(run({"--prompt", "x", "--file", path("long.txt")}), 2, "--file");
}

}  // namespace
}  // namespace natslm::test
