// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/run_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/train/recipes.h"
#include "natslm/train/validate.h"
#include "tests/train/tiny_run.h"

namespace natslm::train {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

class RunTextFiles : public ::testing::Test {
 protected:
  RunTextFiles() {
    fs::create_directories(text_);
    fs::create_directories(run_);
    for (int file = 0; file < 20; ++file) {
      std::ofstream out(text_ / ("f" + std::to_string(file) + ".txt"));
      for (int line = 0; line < 50; ++line)
        out << "line " << line << " of the file " << file << "\n";
    }
  }
  TextOptions options() const { return {.text = {text_}, .held_out = 0.2, .vocabulary = 300}; }

  ScratchFolder folder_;
  fs::path text_ = folder_.path() / "text", run_ = folder_.path() / "run";
};

int64_t tokens(const std::vector<data::PackedTokens>& files) {
  int64_t sum = 0;
  for (const auto& file : files) sum += file.size();
  return sum;
}

TEST_F(RunTextFiles, IsOpenedAgainAsItWasPreparedAlsoInAMovedFolder) {
  const RunText prepared = prepare_text(options(), run_);
  const fs::path moved = folder_.path() / "moved";
  fs::rename(run_, moved);
  fs::remove_all(text_);
  const RunText opened = open_text(moved);
  EXPECT_EQ(tokens(opened.train), tokens(prepared.train));
  EXPECT_EQ(tokens(opened.validation), tokens(prepared.validation));
  EXPECT_EQ(opened.tokenizer->fingerprint(), prepared.tokenizer->fingerprint());
  EXPECT_GT(tokens(prepared.validation), 0);
  EXPECT_LT(tokens(prepared.validation), tokens(prepared.train) / 2);
}

TEST_F(RunTextFiles, TheFingerprintDependsOnTheText) {
  const std::string before = fingerprint(prepare_text(options(), run_));
  EXPECT_EQ(fingerprint(open_text(run_)), before);
  std::ofstream(text_ / "f1.txt", std::ios::app) << "another line\n";
  EXPECT_NE(fingerprint(prepare_text(options(), run_)), before);
}

TEST_F(RunTextFiles, PackedTextIsTakenAsItIsWithItsOwnTokenizerOnly) {
  const RunText first = prepare_text(options(), run_);
  const fs::path other = folder_.path() / "other";
  fs::create_directories(other);
  TextOptions packed{.text = {run_ / "train.tokens"}, .validation = {run_ / "validation.tokens"}};
  EXPECT_THAT([&] { prepare_text(packed, other); },
              ThrowsMessage<Error>(AllOf(HasSubstr("train.tokens"), HasSubstr("--tokenizer"))));
  packed.tokenizer = run_;
  EXPECT_EQ(tokens(prepare_text(packed, other).train), tokens(first.train));
  EXPECT_EQ(fingerprint(open_text(other)), fingerprint(first));
  EXPECT_FALSE(fs::exists(other / "train.tokens")) << "packed files are used where they are";

  TextOptions wrong = options();
  wrong.vocabulary = 280;
  const fs::path third = folder_.path() / "third";
  fs::create_directories(third);
  prepare_text(wrong, third);
  packed.tokenizer = third;
  EXPECT_THAT([&] { prepare_text(packed, other); },
              ThrowsMessage<Error>(HasSubstr("packed with another tokenizer")));
}

TEST_F(RunTextFiles, DamageAndAbsenceAreNamed) {
  EXPECT_THAT([&] { open_text(run_); }, ThrowsMessage<Error>(HasSubstr("text.json")));
  prepare_text(options(), run_);
  const std::string list = read_file(run_ / "text.json");
  std::ofstream(run_ / "text.json") << list.substr(0, 10);
  EXPECT_THAT([&] { open_text(run_); }, ThrowsMessage<Error>(HasSubstr("the file is damaged")));
  std::ofstream(run_ / "text.json") << list;
  fs::resize_file(run_ / "train.tokens", fs::file_size(run_ / "train.tokens") - 2);
  EXPECT_THAT([&] { open_text(run_); }, ThrowsMessage<Error>(HasSubstr("train.tokens")));
  EXPECT_THAT([&] { prepare_text({.text = {folder_.path() / "nothing"}}, run_); },
              ThrowsMessage<Error>(HasSubstr("nothing")));
  EXPECT_THAT([&] { prepare_text({}, run_); }, ThrowsMessage<Error>(HasSubstr("--text")));
}

TEST_F(RunTextFiles, CanBeStopped) {
  EXPECT_THROW(
      prepare_text(options(), run_, [](const std::string&, uint64_t, uint64_t) { return false; }),
      Error);
}

TEST(Validate, IsThePerplexityOfAllWindowsWhateverTheBatch) {
  TinyRun run;
  const Validation one = validate(run.model, run.dataset, 16, 1, 0);
  const Validation many = validate(run.model, run.dataset, 16, 7, 0);
  EXPECT_NEAR(one.perplexity, many.perplexity, 1e-3);
  EXPECT_NEAR(one.shares.kv_end, many.shares.kv_end, 0.05);
  // Untrained weights know nothing: about one in thirteen.
  EXPECT_NEAR(one.perplexity, TinyModel::kVocabulary, 2);
  for (const auto& [name, parameter] : run.model.parameters())
    EXPECT_FALSE(parameter.grad().defined());
  const ScratchFolder folder;
  run.options.steps = 60;
  run.trainer(folder.path()).run();
  EXPECT_LT(validate(run.model, run.dataset, 16, 8, 50).perplexity, one.perplexity - 1);
}

TEST(Recipes, AreValidForEveryPreset) {
  for (const char* name : {"tiny", "small", "gpt2-small"})
    EXPECT_NO_THROW(check(recipe(name))) << name;
  EXPECT_THROW(recipe("large"), Error);
}

}  // namespace
}  // namespace natslm::train
