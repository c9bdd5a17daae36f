// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "natslm/models/side_car.h"
#include "tests/cli/command_test.h"
#include "tests/cli/program.h"
#include "tests/cli/random_model.h"

namespace natslm::test {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class Finetune : public CommandTest {
 protected:
  static void SetUpTestSuite() {
    CommandTest::SetUpTestSuite();
    write_model(*scratch_ / "model", {.context = 1024, .set = roles::RoleSet::kDense});
    write_model(*scratch_ / "same-sizes",
                {.context = 512, .set = roles::RoleSet::kDense, .seed = 2, .norms = 1.5f});
    write_model(*scratch_ / "deeper", {.context = 512, .layers = 3, .set = roles::RoleSet::kDense});
    write_model(*scratch_ / "llama",
                {.architecture = "llama", .context = 512, .set = roles::RoleSet::kDense});
    write_file(*scratch_ / "text.txt", sample_text() + sample_text());
    write_file(*scratch_ / "short.txt", sample_text().substr(0, 300));
  }
  using Options = std::map<std::string, std::string>;
  // A run of some steps that take milliseconds each; `more` adds options or replaces their values.
  static std::vector<std::string> small_run(const std::string& out, const Options& more = {}) {
    Options options{{"--model", path("model")}, {"--text", path("text.txt")},
                    {"--out", path(out)},       {"--context", "256"},
                    {"--batch", "2"},           {"--steps", "5"},
                    {"--window", "8"},          {"--calibration-texts", "1"},
                    {"--threads", "1"}};
    for (const auto& [name, value] : more) options[name] = value;
    std::vector<std::string> arguments{"finetune"};
    for (const auto& [name, value] : options) arguments.insert(arguments.end(), {name, value});
    return arguments;
  }
  static Outcome eval(const std::string& model, const std::vector<std::string>& more) {
    std::vector<std::string> arguments{
        "eval",           "ppl",       "--model", path(model),    "--text",
        path("text.txt"), "--context", "256",     "--max-tokens", "512"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  }
  static nlohmann::json last_results(const std::string& file) {
    return json_lines(file).back()["results"];
  }
  static void expect_error(const Outcome& outcome, int exit_code, const std::string& says) {
    EXPECT_EQ(outcome.exit_code, exit_code) << outcome.err;
    ASSERT_FALSE(outcome.err.empty());
    const std::vector<std::string> lines = lines_of(outcome.err);
    EXPECT_THAT(lines.back(), HasSubstr(says));
    // Above the error there may be progress and nothing else.
    EXPECT_EQ(std::ranges::count_if(lines, [](const auto& l) { return l.starts_with("nats-lm"); }),
              1)
        << outcome.err;
  }
};

TEST_F(Finetune, ASideCarServesEvaluationAndGenerationWithinItsBudget) {
  const Outcome taught = run_program(small_run("a.safetensors", {{"--json", path("a.json")}}));
  ASSERT_EQ(taught.exit_code, 0) << taught.err;
  EXPECT_THAT(taught.out, AllOf(HasSubstr("numbers learned"), HasSubstr("budget bias for 25 %")));
  const auto result = last_results("a.json");
  EXPECT_EQ(result["steps"], 5);
  EXPECT_EQ(result["tokens"], 5 * 2 * 256);
  EXPECT_EQ(result["learned_numbers"], 2 * 3 * 2 * 32);  // layers, roles, KV heads, width
  EXPECT_GE(result["calibration"]["bias"].size(), 13u);
  EXPECT_FALSE(fs::exists(path("a.safetensors.run")));

  const std::vector<std::string> with = {"--roles", path("a.safetensors"), "--json",
                                         path("e.json")};
  auto limited = with;
  limited.insert(limited.end(), {"--kv-budget", "0.2"});
  const Outcome evaluated = eval("model", limited);
  ASSERT_EQ(evaluated.exit_code, 0) << evaluated.err;
  const auto e = last_results("e.json");
  EXPECT_TRUE(e["policy"].get<std::string>().starts_with("learned"));
  EXPECT_LE(e["kv_end_full_windows"].get<double>(), 0.2);
  EXPECT_LE(e["kv_peak_over_cap"].get<double>(), 1);

  const Outcome generated =
      run_program({"generate", "--model", path("model"), "--roles", path("a.safetensors"),
                   "--kv-budget", "0.2", "--prompt", sample_text().substr(0, 600),
                   "--max-new-tokens", "5", "--json", path("g.json")});
  ASSERT_EQ(generated.exit_code, 0) << generated.err;
  EXPECT_LE(last_results("g.json")["kv_end"].get<double>(), 0.2);
}

TEST_F(Finetune, ASideCarChangesNothingOfTheModelWhileEveryKeyLives) {
  ASSERT_EQ(run_program(small_run("n.safetensors", {{"--steps", "2"}})).exit_code, 0);
  ASSERT_EQ(eval("model", {"--policy", "full", "--json", path("plain.json")}).exit_code, 0);
  ASSERT_EQ(eval("model", {"--policy", "full", "--roles", path("n.safetensors"), "--json",
                           path("with.json")})
                .exit_code,
            0);
  EXPECT_EQ(last_results("plain.json")["nll"], last_results("with.json")["nll"]);
}

TEST_F(Finetune, APretrainedFolderIsTaughtTheSameWay) {
  const Outcome taught =
      run_program(small_run("llama.safetensors", {{"--model", path("llama")}, {"--loss", "kl"}}));
  ASSERT_EQ(taught.exit_code, 0) << taught.err;
  const Outcome evaluated =
      eval("llama", {"--roles", path("llama.safetensors"), "--kv-budget", "0.3"});
  EXPECT_EQ(evaluated.exit_code, 0) << evaluated.err;
}

TEST_F(Finetune, ShowPrintsWhatTheFileSaysOfItself) {
  ASSERT_EQ(run_program(small_run("s.safetensors", {{"--lr", "0.02"}})).exit_code, 0);
  const Outcome shown =
      run_program({"roles", "show", path("s.safetensors"), "--json", path("s.json")});
  ASSERT_EQ(shown.exit_code, 0) << shown.err;
  EXPECT_THAT(shown.out, AllOf(HasSubstr("gpt, 2 layers of 4/2 heads of 8"), HasSubstr("KV at end"),
                               HasSubstr("text.txt"), HasSubstr("by layer")));
  // A row an option, not one line of JSON.
  bool rate = false;
  for (const std::string& line : lines_of(shown.out)) {
    EXPECT_LT(line.size(), 160u) << line;
    rate |= line.starts_with("--lr ") && line.ends_with(" 0.02");
  }
  EXPECT_TRUE(rate) << shown.out;
  const auto s = last_results("s.json");
  EXPECT_EQ(s["settings"]["lr"], 0.02);
  EXPECT_EQ(s["window"], 8);
  EXPECT_EQ(s["numbers"], 2 * 3 * 2 * 32);
  // A file of somebody who means harm: to print so many levels would overflow the stack.
  models::SideCar hostile = models::read_side_car(path("s.safetensors"));
  hostile.notes["settings"] =
      "{\"lr\":" + std::string(200'000, '[') + std::string(200'000, ']') + "}";
  models::write_side_car(path("hostile.safetensors"), hostile);
  EXPECT_EQ(run_program({"roles", "show", path("hostile.safetensors")}).exit_code, 0);
  expect_error(run_program({"roles", "show", path("model/model.safetensors")}), 1,
               "this is no role side-car");
  expect_error(run_program({"roles", "show", path("text.txt")}), 1, "text.txt");
  expect_error(run_program({"roles", "show", path("nothing")}), 1, "nothing");
}

TEST_F(Finetune, ASideCarOfAnotherModelIsRefused) {
  ASSERT_EQ(run_program(small_run("b.safetensors", {{"--steps", "1"}})).exit_code, 0);
  expect_error(eval("deeper", {"--roles", path("b.safetensors")}), 1,
               "b.safetensors was made for a model with 'gpt, 2 layers");
  expect_error(eval("same-sizes", {"--roles", path("b.safetensors")}), 1,
               "made for another model of the same sizes");
  expect_error(eval("model", {"--roles", path("text.txt")}), 1, "text.txt");
}

TEST_F(Finetune, TheControlLearnsAsManyNumbersAndEvictsNothing) {
  ASSERT_EQ(run_program(small_run("c.safetensors", {{"--model", path("llama")},
                                                    {"--method", "adapter"},
                                                    {"--json", path("c.json")}}))
                .exit_code,
            0);
  EXPECT_GE(last_results("c.json")["learned_numbers"].get<int>(), 2 * 3 * 2 * 32);
  const Outcome evaluated =
      eval("llama", {"--roles", path("c.safetensors"), "--json", path("ce.json")});
  ASSERT_EQ(evaluated.exit_code, 0) << evaluated.err;
  EXPECT_EQ(last_results("ce.json")["policy"], "full");
  EXPECT_EQ(last_results("ce.json")["kv_end"], 1);
}

TEST_F(Finetune, CtrlCSavesAndResumeEndsWithTheSameFile) {
  const Options steps{{"--steps", "24"}, {"--checkpoint-every", "4"}};
  ASSERT_EQ(run_program(small_run("whole.safetensors", steps)).exit_code, 0);
  {
    Program program(small_run("stopped.safetensors", steps));
    // As soon as there is a checkpoint, wherever the run is then.
    for (int i = 0; i < 6000 && !fs::exists(path("stopped.safetensors.run/latest")); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    program.signal(SIGINT);
    expect_error(program.wait(), 1, "the same command with --resume continues");
  }
  EXPECT_FALSE(fs::exists(path("stopped.safetensors")));
  auto again = small_run("stopped.safetensors", steps);
  again.push_back("--resume");
  auto other = small_run("stopped.safetensors", {{"--steps", "25"}});
  other.push_back("--resume");
  expect_error(run_program(other), 1, "--steps is 25");
  const Outcome resumed = run_program(again);
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_EQ(read_file(path("whole.safetensors")), read_file(path("stopped.safetensors")));
  EXPECT_FALSE(fs::exists(path("stopped.safetensors.run")));
}

TEST_F(Finetune, InputThatCannotWorkGetsOneClearLine) {
  write_file(path("there.safetensors"), "of somebody");
  expect_error(run_program(small_run("there.safetensors")), 1, "is already there");
  EXPECT_EQ(read_file(path("there.safetensors")), "of somebody");
  auto resume = small_run("never.safetensors");
  resume.push_back("--resume");
  expect_error(run_program(resume), 1, "there is no checkpoint in");
  expect_error(run_program(small_run("x", {{"--text", path("short.txt")}})), 1, "give more text");
  expect_error(
      run_program(small_run("x", {{"--text", path("short.txt")}, {"--calibration-texts", "0"}})), 1,
      "short.txt");
  expect_error(run_program(small_run("x", {{"--text", path("nothing")}})), 1, "nothing");
  expect_error(run_program(small_run("x", {{"--context", "4096"}})), 1, "reads at most 1024");
  expect_error(run_program(small_run("x", {{"--model", path("text.txt")}})), 1, "is no model");
  expect_error(run_program(small_run("x", {{"--roles", "dense"}})), 1, "--roles is dense");
  expect_error(run_program(small_run("x", {{"--method", "adapter"}, {"--loss", "kl"}})), 1,
               "leave it out");
  expect_error(run_program(small_run("x", {{"--lr", "nan"}})), 1, "--lr is nan");
  EXPECT_FALSE(fs::exists(path("x")));
}

TEST_F(Finetune, WrongUsageIsExitCodeTwo) {
  expect_error(run_program({"finetune"}), 2, "required");
  expect_error(run_program(small_run("x", {{"--recipe", "theirs"}})), 2, "theirs");
  expect_error(run_program(small_run("x", {{"--lambda", "0.1"}, {"--pairs", "0.2"}})), 2,
               "excludes");
  expect_error(run_program(small_run("x", {{"--steps", "many"}})), 2, "many");
  EXPECT_FALSE(fs::exists(path("x")));
}

TEST_F(Finetune, ARecipeSetsWhatIsNotGiven) {
  const Outcome taught = run_program(small_run("p.safetensors", {{"--recipe", "published"},
                                                                 {"--context", "1024"},
                                                                 {"--steps", "1"},
                                                                 {"--calibration-texts", "0"},
                                                                 {"--json", path("p.json")}}));
  ASSERT_EQ(taught.exit_code, 0) << taught.err;
  const auto line = nlohmann::json::parse(read_file(path("p.json")));
  EXPECT_EQ(line["settings"]["loss"], "hidden-mse");
  EXPECT_EQ(line["settings"]["role-chunk"], 32);
  EXPECT_EQ(line["settings"]["window"], 8);  // given
}

}  // namespace
}  // namespace natslm::test
