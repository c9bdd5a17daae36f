// nats-lm bench, policies, models and info on small sizes: the promised fields, the right accounts,
// wrong settings answered. No test looks at a time. SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/cli/program.h"
#include "tests/cli/random_model.h"

namespace natslm::test {
namespace {

using Json = nlohmann::json;
using Words = std::vector<std::string>;
using testing::HasSubstr;

// The one JSON line of a command that must succeed.
Json json_of(Words command) {
  const ScratchFolder scratch;
  const std::string file = (scratch / "out.json").string();
  command.insert(command.end(), {"--json", file});
  const Outcome outcome = run_program(command);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_FALSE(outcome.out.empty());
  const Words lines = lines_of(read_file(file));
  EXPECT_EQ(lines.size(), 1u);
  return lines.empty() ? Json() : Json::parse(lines[0]);
}

Words bench(const std::string& kind, const Words& more = {}) {
  Words words = {"bench", kind,         "--tokens", "256",      "--heads", "4",        "--kv-heads",
                 "2",     "--head-dim", "16",       "--window", "8",       "--repeat", "1"};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

void expect_bench_fields(const Json& line) {
  for (const char* field : {"ours_ms", "baseline", "baseline_ms", "speedup", "live_pairs", "kv_end",
                            "effective_tflops", "spread"}) {
    EXPECT_TRUE(line["results"].contains(field)) << field;
  }
  const Json& results = line["results"];
  EXPECT_GT(results["ours_ms"].get<double>(), 0);
  EXPECT_NEAR(results["speedup"].get<double>(),
              results["baseline_ms"].get<double>() / results["ours_ms"].get<double>(), 1e-9);
  EXPECT_GT(results["kv_end"].get<double>(), 0);
  EXPECT_LE(results["kv_end"].get<double>(), 1);
}

TEST(Bench, ReportsThePromisedFieldsForEveryKind) {
  const std::vector<Words> commands = {
      bench("attention"),
      bench("attention", {"--backward"}),
      bench("attention", {"--dtype", "bfloat16"}),
      bench("decode", {"--layers", "2", "--batch", "2"}),
      bench("prefill", {"--layers", "2", "--prefill-chunk", "60"}),
      bench("prefill", {"--layers", "1", "--policy", "streaming:sinks=2,window=30"}),
      {"bench", "train", "--context", "32", "--batch", "2", "--repeat", "1"},
  };
  for (const Words& command : commands) {
    SCOPED_TRACE(command[1]);
    const Json line = json_of(command);
    EXPECT_EQ(line["command"], "bench " + command[1]);
    EXPECT_EQ(line["seed"], 1);
    expect_bench_fields(line);
  }
}

TEST(Bench, CountsEveryCausalPairWhenAllKeysAreGlobal) {
  const Json line = json_of(bench("attention", {"--global", "1", "--local", "0"}));
  EXPECT_EQ(line["results"]["live_pairs"], 4 * 256 * 257 / 2);
  EXPECT_EQ(line["results"]["kv_end"], 1.0);
}

TEST(Bench, CountsTheWindowWhenNoKeyButTheFirstIsGlobal) {
  const Json line = json_of(bench("attention", {"--global", "0", "--local", "0"}));
  // The last token reads the first, the 8 before it and itself.
  EXPECT_DOUBLE_EQ(line["results"]["kv_end"].get<double>(), 10.0 / 256);
}

TEST(Bench, DrawsTheSameRolesForTheSameSeedOnly) {
  const auto pairs = [](const char* seed) {
    return json_of(bench("attention", {"--seed", seed}))["results"]["live_pairs"].get<double>();
  };
  EXPECT_EQ(pairs("5"), pairs("5"));
  EXPECT_NE(pairs("5"), pairs("6"));
}

TEST(Bench, PrefillThroughTheCacheKeepsAsManyKeysAsTheRolesSay) {
  const Json kept =
      json_of(bench("prefill", {"--layers", "2", "--prefill-chunk", "50"}))["results"];
  const Json all =
      json_of(bench("prefill", {"--layers", "2", "--global", "1", "--local", "0"}))["results"];
  EXPECT_LT(kept["kv_bytes_peak"].get<double>(), kept["baseline_kv_bytes_peak"].get<double>());
  EXPECT_EQ(all["kv_end"], 1.0);
  EXPECT_EQ(all["kv_bytes_peak"], all["baseline_kv_bytes_peak"]);
}

TEST(Bench, AttentionGoesThroughEveryCombinationOfItsLists) {
  const ScratchFolder scratch;
  const std::string file = (scratch / "out.json").string();
  const Outcome outcome =
      run_program({"bench", "attention", "--tokens", "64", "128", "--global", "0.1", "0.5",
                   "--shape", "2/1/16", "4/4/8", "--repeat", "1", "--uneven", "--json", file});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const Words lines = lines_of(read_file(file));
  EXPECT_EQ(lines.size(), 8u);
  std::set<std::string> seen;
  for (const std::string& line : lines) {
    const Json results = Json::parse(line)["results"];
    seen.insert(results["shape"].get<std::string>() + " " + results["tokens"].dump());
    EXPECT_TRUE(results.contains("uneven_over_even"));
  }
  EXPECT_EQ(seen.size(), 4u);
}

TEST(Bench, DrawsRolesThatLeaveTheWantedShareOfThePairs) {
  const std::vector<double> wanted = {0.02, 0.1, 0.3, 0.5, 0.75, 0.95, 1};
  const ScratchFolder scratch;
  const std::string file = (scratch / "out.json").string();
  Words command = {"bench",    "attention",  "--tokens", "512",      "--heads",  "8", "--kv-heads",
                   "8",        "--head-dim", "8",        "--window", "0",        "8", "200",
                   "--repeat", "1",          "--json",   file,       "--density"};
  for (const double density : wanted) command.push_back(std::to_string(density));
  const Outcome outcome = run_program(command);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const Words lines = lines_of(read_file(file));
  ASSERT_EQ(lines.size(), 3 * wanted.size());
  for (size_t i = 0; i < lines.size(); ++i) {
    const double pairs = Json::parse(lines[i])["results"]["pairs"].get<double>();
    EXPECT_NEAR(pairs, wanted[i / 3], 0.03);
    EXPECT_EQ(pairs == 1, wanted[i / 3] == 1);
  }
}

TEST(Bench, NamesTheSlowestCaseBesideDense) {
  const Outcome outcome = run_program(bench("attention", {"--density", "0.2", "0.8", "1"}));
  EXPECT_THAT(outcome.out, HasSubstr("slowest beside dense, forward, below 50 % visible: "));
  EXPECT_THAT(outcome.out, HasSubstr("slowest beside dense, forward, 50 to 100 %: "));
  EXPECT_THAT(outcome.out, HasSubstr("slowest beside dense, forward, all visible: "));
}

TEST(Bench, TakesAsManySequencesAsMakeABatch) {
  const Json results =
      json_of({"bench", "attention", "--tokens", "4096", "--batch", "0", "--heads", "1",
               "--kv-heads", "1", "--head-dim", "8", "--repeat", "1"})["results"];
  EXPECT_EQ(results["batch"], 4);
}

TEST(Bench, TimesTheRolesThatAModelGivesToAText) {
  const ScratchFolder scratch;
  write_model(scratch / "model", {.context = 64, .layers = 2});
  std::ofstream(scratch / "text.txt") << sample_text();
  const Words command = {"bench",      "attention",
                         "--roles-of", (scratch / "model").string(),
                         "--text",     (scratch / "text.txt").string(),
                         "--repeat",   "1",
                         "--tokens"};
  Words two_windows = command;
  two_windows.push_back("150");
  const Json results = json_of(two_windows)["results"];
  EXPECT_EQ(results["tokens"], 150);
  EXPECT_EQ(results["batch"], 2);  // its layers
  EXPECT_GT(results["uneven_over_even"].get<double>(), 0);
  Words too_long = command;
  too_long.push_back("1000000");
  const Outcome outcome = run_program(too_long);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("--tokens 1000000 asks for more"));
}

// Where there is a GPU the first of these runs; everywhere else it says in a line why not.
TEST(Bench, SaysWhyThereIsNoGpu) {
  const Outcome outcome = run_program(bench("attention", {"--device", "cuda"}));
  if (outcome.exit_code == 0) {
    std::printf("*** TEST SKIPPED: there is a GPU, so nothing says why there is none ***\n");
    GTEST_SKIP() << "there is a GPU";
  }
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(lines_of(outcome.err).size(), 1u) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("--device cuda: "));
}

TEST(Bench, AnswersSettingsThatContradictEachOther) {
  struct Case {
    Words more;
    std::string expected;
  };
  const Case cases[] = {
      {{"--heads", "5"}, "5 is not a multiple of --kv-heads 2"},
      {{"--head-dim", "20"}, "20 is not a multiple of 8"},
      {{"--global", "0.6", "--local", "0.6"}, "add up to more than 1"},
      {{"--global", "1.5"}, "not in range"},
      {{"--dtype", "float16"}, "float16"},
      {{"--tokens", "0"}, "not in range"},
      {{"--shape", "32/8"}, "32/8 is not heads/kv-heads/head-dim"},
      {{"--baseline", "cudn"}, "cudn"},
      {{"--path", "library"}, "library reads every key"},
      {{"--roles-of", "model"}, "--text"},
      {{"--device", "gpu"}, "gpu"},
  };
  for (const Case& c : cases) {
    Words command = {"bench", "attention"};
    command.insert(command.end(), c.more.begin(), c.more.end());
    if (c.more[0] == "--heads") command.insert(command.end(), {"--kv-heads", "2"});
    const Outcome outcome = run_program(command);
    EXPECT_EQ(outcome.exit_code, 2) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(c.expected));
    EXPECT_EQ(lines_of(outcome.err).size(), 1u) << outcome.err;
  }
  const Outcome policy = run_program(bench("prefill", {"--policy", "oracle"}));
  EXPECT_EQ(policy.exit_code, 1);
  EXPECT_THAT(policy.err, HasSubstr("unknown policy \"oracle\"; known are full"));
}

TEST(Policies, AreListedWithTheirOptions) {
  const Json line = json_of({"policies"});
  Words names;
  for (const Json& policy : line["results"]["policies"]) names.push_back(policy["name"]);
  EXPECT_THAT(names, testing::IsSupersetOf({"full", "learned", "streaming", "h2o", "random"}));
  for (const Json& policy : line["results"]["policies"]) {
    for (const Json& option : policy["options"]) {
      EXPECT_FALSE(option["default"].get<std::string>().empty()) << policy["name"];
      EXPECT_FALSE(option["summary"].get<std::string>().empty()) << policy["name"];
    }
  }
}

TEST(Models, AreListedWithTheSizesOfTheirPresets) {
  const Json results = json_of({"models"})["results"];
  EXPECT_EQ(results["architectures"][0]["name"], "gpt");
  EXPECT_EQ(results["presets"][0]["name"], "tiny");
  EXPECT_EQ(results["presets"][0]["config"]["width"], 128);
  EXPECT_EQ(results["presets"][0]["batch"], 16);
}

TEST(Info, PrintsTheCrossoverTable) {
  const Json results = json_of({"info"})["results"];
  EXPECT_GE(results["crossovers"].size(), 2u);
  EXPECT_FALSE(results["gpu"].get<std::string>().empty());
}

TEST(Info, SaysWhatABugReportNeeds) {
  const Json results = json_of({"info"})["results"];
  for (const char* field : {"version", "commit", "libtorch", "compiler", "device", "kernels"}) {
    EXPECT_FALSE(results[field].get<std::string>().empty()) << field;
  }
}

}  // namespace
}  // namespace natslm::test
