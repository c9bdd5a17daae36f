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

class EvalPpl : public CommandTest {
 protected:
  static void SetUpTestSuite() {
    CommandTest::SetUpTestSuite();
    write_model(*scratch_ / "model");
    write_model(*scratch_ / "dense", {.set = roles::RoleSet::kDense, .seed = 2});
    write_file(*scratch_ / "text.txt", sample_text());
    write_file(*scratch_ / "empty.txt", "");
  }

  // eval ppl of the model over the text, with more options.
  static Outcome run(const std::vector<std::string>& more, const std::string& model = "model",
                     const std::string& text = "text.txt") {
    std::vector<std::string> arguments{"eval", "ppl", "--model", path(model), "--text", path(text)};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  }
  static std::vector<nlohmann::json> results(const std::vector<std::string>& more) {
    std::vector<std::string> arguments = more;
    arguments.insert(arguments.end(), {"--json", path("out.json")});
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return json_lines("out.json");
  }
};

TEST_F(EvalPpl, PrintsALineAPolicyAndWritesItsJson) {
  const auto lines = results({"--policy", "full", "--policy", "learned", "--policy",
                              "streaming:sinks=2,window=14", "--max-tokens", "1500"});
  ASSERT_EQ(lines.size(), 3u);
  for (const nlohmann::json& line : lines) {
    EXPECT_EQ(line["command"], "eval ppl");
    const nlohmann::json& r = line["results"];
    for (const char* field : {"policy", "perplexity", "nll", "tokens", "kv_end", "kv_mean",
                              "kv_bytes_mean", "kv_bytes_peak", "seconds"}) {
      EXPECT_TRUE(r.contains(field)) << field;
    }
    EXPECT_EQ(r["tokens"], lines[0]["results"]["tokens"]);
    EXPECT_NEAR(std::exp(r["nll"].get<double>()), r["perplexity"].get<double>(), 1e-6);
  }
  EXPECT_EQ(lines[0]["results"]["kv_end"], 1);
  EXPECT_EQ(lines[2]["results"]["policy"], "streaming:sinks=2,window=14");
  EXPECT_NEAR(lines[2]["results"]["kv_end_full_windows"].get<double>(), 16.0 / 128, 1e-9);
  EXPECT_LT(lines[1]["results"]["kv_bytes_mean"], lines[0]["results"]["kv_bytes_mean"]);
}

TEST_F(EvalPpl, ChunkAndBatchChangeNothing) {
  const auto a =
      results({"--max-tokens", "1000", "--prefill-chunk", "1", "--batch", "1"})[0]["results"];
  const auto b = results({"--max-tokens", "1000"})[0]["results"];
  EXPECT_NEAR(a["nll"].get<double>(), b["nll"].get<double>(), 1e-5);
  EXPECT_NEAR(a["kv_end"].get<double>(), b["kv_end"].get<double>(), 1e-9);
  EXPECT_NEAR(a["kv_mean"].get<double>(), b["kv_mean"].get<double>(), 1e-9);
}

TEST_F(EvalPpl, AtEqualBudgetRivalsRunOnTheRivalModelWithTheLearnedShareOfKeys) {
  const auto lines =
      results({"--equal-budget", "--rival-model", path("dense"), "--max-tokens", "1500"});
  ASSERT_EQ(lines.size(), 5u);
  const double budget = lines[1]["results"]["kv_end_full_windows"];
  const std::string names[] = {"full", "learned", "streaming", "h2o", "random"};
  for (size_t i = 0; i < 5; ++i) {
    const nlohmann::json& r = lines[i]["results"];
    EXPECT_TRUE(r["policy"].get<std::string>().starts_with(names[i])) << r["policy"];
    EXPECT_EQ(r["model"], path(i == 1 ? "model" : "dense"));
    if (i > 1) {
      EXPECT_NEAR(r["kv_end_full_windows"].get<double>(), budget, 0.06 * budget);
    }
  }
}

TEST_F(EvalPpl, ABudgetIsMetByEveryPolicy) {
  const auto lines = results({"--kv-budget", "0.3", "--policy", "learned", "--policy", "streaming",
                              "--policy", "full", "--max-tokens", "1024"});
  // Learned roles never pass it, so that they may stay below it.
  EXPECT_LE(lines[0]["results"]["kv_end_full_windows"].get<double>(), 0.3);
  EXPECT_GT(lines[0]["results"]["kv_end_full_windows"].get<double>(), 0.2);
  EXPECT_LE(lines[0]["results"]["kv_peak_over_cap"].get<double>(), 1);
  EXPECT_GT(lines[0]["results"]["demoted"].get<int64_t>(), 0);
  EXPECT_EQ(lines[1]["results"]["demoted"], 0);
  EXPECT_NEAR(lines[1]["results"]["kv_end_full_windows"].get<double>(), 0.3, 0.02);
  EXPECT_EQ(lines[2]["results"]["kv_end"], 1);
}

TEST_F(EvalPpl, ABudgetInMebibytesIsOneOfAWindow) {
  // 2 layers of 2 heads and windows of 128 tokens: 512 keys of 64 bytes in float32.
  const auto lines = results({"--kv-mb", "0.009375", "--policy", "learned", "--policy", "streaming",
                              "--max-tokens", "1024"});
  EXPECT_LE(lines[0]["results"]["kv_end_full_windows"].get<double>(), 0.3);
  EXPECT_LE(lines[0]["results"]["kv_peak_over_cap"].get<double>(), 1);
  EXPECT_NEAR(lines[1]["results"]["kv_end_full_windows"].get<double>(), 0.3, 0.02);
}

TEST_F(EvalPpl, ContinuousGoesBeyondTheContextForPoliciesThatRenumber) {
  const Outcome fine =
      run({"--continuous", "--policy", "streaming:sinks=4,window=28", "--max-tokens", "500"});
  EXPECT_EQ(fine.exit_code, 0) << fine.err;
  expect_error(run({"--continuous", "--policy", "full", "--max-tokens", "500"}), 1,
               "longer than the context this model was built for (128)");
}

TEST_F(EvalPpl, InputThatCannotWorkGetsOneClearLine) {
  expect_error(run({"--policy", "nothing"}), 1,
               "unknown policy \"nothing\"; known are full, learned");
  expect_error(run({"--policy", "streaming:sink=3"}), 1, "sink");
  expect_error(run({}, "no such model"), 1, "no such model is no model");
  expect_error(run({}, "model", "empty.txt"), 1, "text");
  expect_error(run({}, "model", "no such text"), 1, "no such text");
  expect_error(run({"--context", "100000", "--policy", "full"}), 1,
               "longer than the context this model was built for (128)");
  expect_error(run({"--stride", "128"}), 1, "stride of 128");
  expect_error(run({"--policy", "learned"}, "dense"), 1, "trained without roles");
  expect_error(run({"--prefill-chunk", "0"}), 2, "--prefill-chunk");
  expect_error(run_program({"eval", "ppl", "--text", "x"}), 2, "--model");
  expect_error(run_program({"eval"}), 2, "ppl");
}

TEST_F(EvalPpl, ADamagedModelGetsOneClearLine) {
  write_model(path("damaged"));
  const std::string weights = read_file(path("damaged") + "/model.safetensors");
  write_file(path("damaged") + "/model.safetensors", weights.substr(0, weights.size() / 2));
  expect_error(run({}, "damaged"), 1, "model.safetensors");
  std::filesystem::remove(path("damaged") + "/tokenizer.json");
  write_file(path("damaged") + "/model.safetensors", weights);
  expect_error(run({}, "damaged"), 1, "tokenizer");
}

}  // namespace
}  // namespace natslm::test
