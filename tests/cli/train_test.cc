// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/cli/program.h"

namespace natslm::test {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

class Train : public ::testing::Test {
 protected:
  Train() {
    std::string text;
    for (int i = 0; i < 1500; ++i)
      text += "Line " + std::to_string(i * i % 97) + " of a text about " + std::to_string(i % 7) +
              " things.\n";
    write_file(scratch_ / "text.txt", text);
  }
  std::string path(const std::string& name) const { return (scratch_ / name).string(); }
  // A run of some steps that take milliseconds each; `more` adds options or replaces their values.
  std::vector<std::string> small_run(const std::string& out,
                                     const std::map<std::string, std::string>& more = {}) const {
    std::map<std::string, std::string> options{
        {"--text", path("text.txt")}, {"--out", path(out)}, {"--vocabulary", "300"},
        {"--context", "32"},          {"--batch", "2"},     {"--steps", "12"},
        {"--warm-up", "2"},           {"--threads", "1"},   {"--validation-windows", "4"}};
    for (const auto& [name, value] : more) options[name] = value;
    std::vector<std::string> arguments{"train"};
    for (const auto& [name, value] : options) arguments.insert(arguments.end(), {name, value});
    return arguments;
  }
  static void expect_error(const Outcome& outcome, int exit_code, const std::string& says) {
    EXPECT_EQ(outcome.exit_code, exit_code) << outcome.err;
    ASSERT_FALSE(outcome.err.empty());
    EXPECT_THAT(lines_of(outcome.err).back(), HasSubstr(says));
  }
  ScratchFolder scratch_;
};

TEST_F(Train, WritesAModelThatTheOtherCommandsTakeAndSaysHowItWent) {
  const Outcome trained = run_program(small_run("run", {{"--json", path("train.json")}}));
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  EXPECT_THAT(trained.out, AllOf(HasSubstr("validation perplexity"), HasSubstr("KV at end")));
  const auto line = nlohmann::json::parse(read_file(path("train.json")));
  EXPECT_EQ(line["command"], "train");
  EXPECT_EQ(line["settings"]["steps"], 12);
  EXPECT_EQ(line["settings"]["context"], 32);
  EXPECT_EQ(line["results"]["tokens"], 12 * 2 * 32);
  for (const char* field : {"steps", "tokens", "tokens_per_s", "loss", "validation_perplexity",
                            "kv_end", "kv_mean", "pairs", "lambda", "peak_bytes"})
    EXPECT_TRUE(line["results"][field].is_number()) << field;
  const Outcome evaluated =
      run_program({"eval", "ppl", "--model", path("run"), "--text", path("text.txt"),
                   "--max-tokens", "200", "--threads", "1"});
  EXPECT_EQ(evaluated.exit_code, 0) << evaluated.err;
}

TEST_F(Train, ARunKilledByTheSystemEndsWithTheSameModel) {
  const std::map<std::string, std::string> often{{"--checkpoint-every", "3"}, {"--steps", "60"}};
  ASSERT_EQ(run_program(small_run("whole", often)).exit_code, 0);
  {
    Program program(small_run("killed", often));
    // As soon as there is a checkpoint, at whatever the run is doing then.
    for (int i = 0; i < 6000 && !fs::exists(fs::path(path("killed")) / "checkpoints" / "latest");
         ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    program.signal(SIGKILL);
    EXPECT_EQ(program.wait().exit_code, 128 + SIGKILL);
  }
  const Outcome resumed = run_program({"train", "--resume", path("killed"), "--threads", "1"});
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_THAT(resumed.err, HasSubstr("from step"));
  for (const char* file : {"model.safetensors", "config.json", "tokenizer.json"})
    EXPECT_EQ(read_file(fs::path(path("whole")) / file), read_file(fs::path(path("killed")) / file))
        << file;
}

TEST_F(Train, CtrlCSavesAndSaysHowToGoOn) {
  Program program(small_run("run", {{"--steps", "100000"}, {"--checkpoint-every", "5"}}));
  for (int i = 0; i < 6000 && !fs::exists(fs::path(path("run")) / "checkpoints" / "latest"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  program.signal(SIGINT);
  expect_error(program.wait(), 1, "continue with --resume " + path("run"));
}

TEST_F(Train, ResumeRefusesWhatWouldMakeItAnotherRun) {
  ASSERT_EQ(run_program(small_run("run")).exit_code, 0);
  const auto resume = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments{"train", "--resume", path("run"), "--threads", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  };
  expect_error(resume({"--lr", "0.5"}), 1, "--lr is 0.5");
  expect_error(resume({"--steps", "13"}), 1, "--steps is 13");
  expect_error(resume({"--text", path("text.txt")}), 1, "--text cannot be given with --resume");
  expect_error(resume({"--roles", "dense"}), 1, "--roles cannot be given with --resume");
  EXPECT_EQ(resume({"--log-every", "3"}).exit_code, 0);
  expect_error(run_program(small_run("run")), 1, "already holds a run");
}

TEST_F(Train, WhatTheRolesLearnFromCanBeVaried) {
  const std::map<std::string, std::string> varied{
      {"--optimize", "alternating"}, {"--bias-range", "1.5"}, {"--end-term", "true"},
      {"--limit-factor", "false"},   {"--role-lr", "2"},      {"--json", path("train.json")}};
  ASSERT_EQ(run_program(small_run("run", varied)).exit_code, 0);
  const auto settings = nlohmann::json::parse(read_file(path("train.json")))["settings"];
  EXPECT_EQ(settings["optimize"], "alternating");
  EXPECT_EQ(settings["bias-range"], 1.5);
  EXPECT_EQ(settings["end-term"], true);
  EXPECT_EQ(settings["limit-factor"], false);
  EXPECT_EQ(settings["causal-normalizer"], false);
  expect_error(run_program({"train", "--resume", path("run"), "--optimize", "joint"}), 1,
               "--optimize is \"joint\"");
  expect_error(run_program(small_run("x", {{"--optimize", "both"}})), 1, "--optimize is both");
  expect_error(run_program(small_run("x", {{"--optimize", "alternating"}, {"--roles", "dense"}})),
               1, "a dense model has no roles");
  expect_error(run_program(small_run("y", {{"--optimize", "alternating"}, {"--batch", "3"}})), 1,
               "it must be even");
}

TEST_F(Train, ADamagedCheckpointIsRefusedAndTheOneBeforeOffered) {
  ASSERT_EQ(run_program(small_run("run", {{"--checkpoint-every", "6"}})).exit_code, 0);
  const fs::path checkpoints = fs::path(path("run")) / "checkpoints";
  std::string weights = read_file(checkpoints / "step-000012" / "model.safetensors");
  weights[weights.size() / 2] = static_cast<char>(weights[weights.size() / 2] ^ 1);
  write_file(checkpoints / "step-000012" / "model.safetensors", weights);
  const std::string before = (checkpoints / "step-000006").string();
  expect_error(run_program({"train", "--resume", path("run")}), 1, "--resume " + before);
  const Outcome resumed = run_program({"train", "--resume", before, "--threads", "1"});
  EXPECT_EQ(resumed.exit_code, 0) << resumed.err;
}

TEST_F(Train, WrongUsageIsExitCodeTwo) {
  expect_error(run_program({"train"}), 2, "--text");
  expect_error(run_program({"train", "--text", path("text.txt")}), 2, "--out");
  expect_error(run_program(small_run("x", {{"--preset", "huge"}})), 2, "huge");
  expect_error(run_program(small_run("x", {{"--lambda", "0.1"}, {"--kv-budget", "0.2"}})), 2,
               "excludes");
  expect_error(run_program(small_run("x", {{"--steps", "many"}})), 2, "many");
  EXPECT_FALSE(fs::exists(path("x")));
}

TEST_F(Train, InputThatCannotBeTrainedOnIsNamed) {
  expect_error(run_program({"train", "--text", path("nothing"), "--out", path("x")}), 1, "nothing");
  write_file(path("empty.txt"), "");
  expect_error(run_program({"train", "--text", path("empty.txt"), "--out", path("x")}), 1, "empty");
  write_file(path("short.txt"), "Hardly any text.\n");
  expect_error(run_program({"train", "--text", path("short.txt"), "--out", path("x")}), 1,
               "cannot be split");
  expect_error(run_program(small_run("x", {{"--text", path("short.txt")}, {"--held-out", "0"}})), 1,
               "fewer than one window");
  expect_error(run_program(small_run("x", {{"--lr", "nan"}})), 1, "--lr is nan");
  expect_error(run_program(small_run("x", {{"--batch", "0"}})), 1, "--batch is 0");
  expect_error(run_program(small_run("x", {{"--device", "cuda"}})), 1, "--device cuda: ");
  expect_error(run_program({"train", "--resume", path("nothing")}), 1, "not a folder");
  fs::create_directories(path("hollow"));
  expect_error(run_program({"train", "--resume", path("hollow")}), 1, "no checkpoint");
}

TEST_F(Train, ALearningRateThatBlowsUpStopsAtTheStep) {
  expect_error(run_program(small_run("run", {{"--lr", "1e30"}, {"--warm-up", "0"}})), 1,
               "is not finite");
}

}  // namespace
}  // namespace natslm::test
