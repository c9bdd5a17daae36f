// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "natslm/eval/comparison.h"
#include "natslm/eval/facts.h"
#include "natslm/eval/repeat.h"
#include "natslm/eval/runs.h"
#include "natslm/models/models.h"
#include "natslm/policies/policies.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/error_of.h"
#include "tests/support/plain_policies.h"
#include "tests/support/small_config.h"
#include "tests/support/small_model.h"
#include "tests/support/some_prose.h"

namespace natslm::eval {
namespace {

using test::ByteTokenizer;
using test::error_of;
using test::KeepAll;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int32_t kContext = 1500;

// A key is readable by its own query alone.
class KeepNothing final : public cache::Policy {
 public:
  std::string spec() const override { return "keep-nothing"; }
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys>) override {
    int32_t* last = fresh.last.mutable_data_ptr<int32_t>();
    const int64_t count = fresh.last.size(1);
    for (int64_t i = 0; i < fresh.last.numel(); ++i) {
      last[i] = fresh.first_position + static_cast<int32_t>(i % count);
    }
  }
};

// Knows every answer, and gives it if the key of the answer's first byte in the context is still
// alive when it is asked, else "?". Its keys and values are zeros, but they go through the cache.
class Scholar final : public models::Model {
 public:
  explicit Scholar(const FactsTask& task) {
    config_.architecture = "scholar";
    config_.layers = config_.q_heads = config_.kv_heads = 1;
    config_.head_dim = 8;
    config_.width = 8;
    config_.vocabulary = 256;
    config_.context = kContext;
    for (const data::PlantedFacts& text : task) {
      const std::string context = ByteTokenizer().decode(text.context);
      for (const auto& question : text.questions) {
        answers_[context + question.text] = question.answer;
      }
    }
  }
  // What it says instead of an answer.
  std::function<std::string(const std::string& answer)> says = [](const std::string& answer) {
    return " " + answer + ".\nAnd";
  };

  models::TrainingOutput forward(const models::TrainingInput&) override { return {}; }

  at::Tensor step(const models::StepInput& input, cache::KvCache& cache) override {
    const int64_t rows = input.tokens.size(0);
    EXPECT_TRUE(input.last_row_only);
    const at::Tensor zeros = at::zeros({rows, 1, 8});
    cache.attend(0, input.step, {.q = zeros, .k = zeros, .v = zeros, .hidden = zeros});
    const auto sequences = static_cast<int64_t>(input.step.slots.size());
    at::Tensor logits = at::zeros({sequences, 256});
    for (int64_t s = 0; s < sequences; ++s) {
      const int32_t slot = input.step.slots[s];
      std::string& text = texts_[slot];
      if (cache.length(slot) == 0) text.clear();
      for (int32_t row = input.step.row_start[s]; row < input.step.row_start[s + 1]; ++row) {
        text += static_cast<char>(input.tokens.const_data_ptr<int64_t>()[row]);
      }
      logits[s][static_cast<uint8_t>(next(text, cache.live_positions(slot, 0, 0)))] = 1;
    }
    cache.finish_step(input.step);
    return logits;
  }

 private:
  char next(const std::string& text, const std::vector<int32_t>& alive) const {
    for (const auto& [prompt, answer] : answers_) {
      if (!text.starts_with(prompt)) continue;
      const auto where = static_cast<int32_t>(text.find(answer));
      const std::string given = std::ranges::count(alive, where) > 0 ? says(answer) : "?\n";
      const size_t done = text.size() - prompt.size();
      if (done < given.size()) return given[done];
    }
    return '#';
  }
  std::map<std::string, std::string> answers_;  // by prompt
  std::map<int32_t, std::string> texts_;        // by slot
};

class Recall : public ::testing::Test {
 protected:
  FactsTask task(int32_t samples = 6, int32_t facts = 6, int32_t ask = 3) const {
    return facts_task(tasks_,
                      {.context = kContext, .facts = facts, .ask = ask, .samples = samples});
  }
  static std::unique_ptr<models::Model> random_model() {
    models::Config config = test::small_sizes("gpt");
    config.hidden = 64;
    config.vocabulary = 256;
    config.context = kContext;
    auto model = models::make_model(config, 3);
    test::enlarge_weights(*model);
    return model;
  }
  ByteTokenizer bytes_;
  std::vector<int32_t> ids_ = bytes_.encode(test::some_prose(20000));
  data::RecallTasks tasks_{bytes_, {"prose", 1, {ids_}}, 5};
};

TEST(Recalled, IsAnAnswerThatTheTextBeginsWith) {
  EXPECT_TRUE(recalled(" apple.", "apple"));
  EXPECT_TRUE(recalled("apple", "apple"));
  EXPECT_TRUE(recalled("  4711, I think", "4711"));
  EXPECT_FALSE(recalled(" Apple", "apple"));
  EXPECT_FALSE(recalled(" the apple", "apple"));
  EXPECT_FALSE(recalled(" apples", "apple"));
  EXPECT_FALSE(recalled(" 47112", "4711"));
  EXPECT_FALSE(recalled(" 471", "4711"));
  EXPECT_FALSE(recalled(" appl\xC3\xA9", "appl"));
  EXPECT_FALSE(recalled("", "apple"));
  EXPECT_FALSE(recalled("   ", "apple"));
}

TEST_F(Recall, AModelThatKeepsEveryKeyCanRecallEverything) {
  const FactsTask facts = task();
  Scholar model(facts);
  std::vector<std::string> given;
  const FactsResult result =
      recall_facts(model, std::make_unique<KeepAll>(), bytes_, facts, {},
                   {.on_answer = [&](const Answered& a) { given.emplace_back(a.given); }});
  EXPECT_EQ(result.score, 1);
  EXPECT_EQ(result.error, 0);
  EXPECT_EQ(result.questions, 18);
  EXPECT_NEAR(result.keys.kv_end, 1, 1e-12);
  EXPECT_NEAR(result.keys.kv_mean, 1, 1e-12);
  EXPECT_EQ(result.policy, "keep-all");
  ASSERT_EQ(given.size(), 18u);
  for (const std::string& text : given) EXPECT_THAT(text, Not(HasSubstr("\n")));
}

TEST_F(Recall, APolicyThatKeepsNothingRecallsNothing) {
  const FactsTask facts = task();
  Scholar model(facts);
  const FactsResult result = recall_facts(model, std::make_unique<KeepNothing>(), bytes_, facts);
  EXPECT_EQ(result.score, 0);
  EXPECT_EQ(result.questions, 18);
  EXPECT_LT(result.keys.kv_end, 0.01);
  EXPECT_LT(result.keys.kv_bytes_mean, 0.2 * kContext * 64);
}

TEST_F(Recall, AWindowRecallsTheFactsThatLieInIt) {
  const FactsTask facts = task(10, 6, 6);
  Scholar model(facts);
  int64_t inside = 0, asked = 0;
  const size_t window = 700;
  const FactsResult result = recall_facts(
      model,
      policies::make_policy("streaming-original:sinks=1,window=" + std::to_string(window),
                            policy_context(model)),
      bytes_, facts, {}, {.on_answer = [&](const Answered& a) {
        const std::string context = bytes_.decode(facts[a.text].context);
        const size_t place = context.find(a.question.answer);
        // The first query that needs it is the prompt's last token, the last one the answer's.
        const size_t first = context.size() + a.question.text.size() - 1,
                     last = first + a.question.answer.size();
        EXPECT_TRUE(a.recalled || last - place >= window) << a.question.text;
        EXPECT_TRUE(!a.recalled || first - place < window) << a.question.text;
        inside += a.recalled;
        ++asked;
      }});
  EXPECT_EQ(asked, 60);
  EXPECT_GT(inside, 5);
  EXPECT_LT(inside, 55);
  EXPECT_EQ(result.score, static_cast<double>(inside) / 60);
  EXPECT_GT(result.error, 0);
}

TEST_F(Recall, OnlyExactAnswersCount) {
  const FactsTask facts = task(8, 8, 8);
  Scholar model(facts);
  int64_t words = 0;
  for (const data::PlantedFacts& text : facts) {
    for (const auto& question : text.questions) words += question.answer[0] > '9' ? 1 : 0;
  }
  ASSERT_GT(words, 0);
  ASSERT_LT(words, 64);
  model.says = [](const std::string& answer) {
    return answer[0] > '9' ? " " + answer : " " + answer + "0";
  };
  const FactsResult result = recall_facts(model, std::make_unique<KeepAll>(), bytes_, facts);
  EXPECT_EQ(result.score, static_cast<double>(words) / 64);
}

TEST_F(Recall, AnAnswerEndsWithItsLineOrTwelveTokens) {
  const FactsTask facts = task(1, 2, 2);
  Scholar model(facts);
  model.says = [](const std::string&) { return "a long story that does not end\n"; };
  recall_facts(model, std::make_unique<KeepAll>(), bytes_, facts, {},
               {.on_answer = [](const Answered& a) { EXPECT_EQ(a.given, "a long story"); }});
  model.says = [](const std::string&) { return "yes\nand more"; };
  recall_facts(model, std::make_unique<KeepAll>(), bytes_, facts, {},
               {.on_answer = [](const Answered& a) { EXPECT_EQ(a.given, "yes"); }});
}

TEST_F(Recall, TextQuestionAndAnswerFitTheContext) {
  for (const data::PlantedFacts& text : task(6, 6, 6)) {
    size_t longest = 0;
    for (const auto& question : text.questions) {
      longest = std::max(longest, question.tokens.size());
    }
    EXPECT_EQ(text.context.size() + longest + kMostAnswerTokens, static_cast<size_t>(kContext));
  }
}

TEST_F(Recall, BudgetsAreSetOnQuestionsInTheirContextAllOfOneLength) {
  const FactsTask facts = task(5, 6, 3);
  std::vector<std::vector<int32_t>> prompts;
  std::vector<size_t> sizes;
  for (const data::PlantedFacts& text : facts) {
    for (const auto& question : text.questions) {
      prompts.push_back(text.context);
      prompts.back().insert(prompts.back().end(), question.tokens.begin(), question.tokens.end());
      sizes.push_back(prompts.back().size());
    }
  }
  std::ranges::sort(sizes);
  const Streams texts = budget_texts(facts);
  EXPECT_GE(texts.size(), 8u);
  for (const auto& text : texts) {
    EXPECT_EQ(text.size(), sizes[7]);  // of 15
    EXPECT_TRUE(std::ranges::any_of(prompts, [&](const auto& prompt) {
      return prompt.size() >= text.size() && std::equal(text.begin(), text.end(), prompt.begin());
    }));
  }
}

TEST_F(Recall, ChunksAndBatchesChangeNothing) {
  const auto model = random_model();
  const FactsTask facts = task(3, 4, 2);
  std::map<std::string, std::string> given[2];
  FactsResult results[2];
  for (int run = 0; run < 2; ++run) {
    results[run] = recall_facts(*model, std::make_unique<KeepAll>(), bytes_, facts,
                                {.prefill_chunk = run == 0 ? 64 : 100, .batch = run == 0 ? 4 : 1},
                                {.on_answer = [&](const Answered& a) {
                                  given[run][std::to_string(a.text) + a.question.text] = a.given;
                                }});
  }
  EXPECT_EQ(given[0], given[1]);
  EXPECT_EQ(given[0].size(), 6u);
  EXPECT_EQ(results[0].score, results[1].score);
  EXPECT_NEAR(results[0].keys.kv_end, results[1].keys.kv_end, 1e-12);
}

TEST_F(Recall, ProgressCountsQuestionsAndMayStopTheRun) {
  const FactsTask facts = task();
  Scholar model(facts);
  int64_t last = 0;
  recall_facts(model, std::make_unique<KeepAll>(), bytes_, facts, {},
               {.on_progress = [&](int64_t questions) { last = questions; }});
  EXPECT_EQ(last, 18);
  EXPECT_EQ(error_of([&] {
              recall_facts(model, std::make_unique<KeepAll>(), bytes_, facts, {},
                           {.on_progress = [](int64_t) { fail("stopped"); }});
            }),
            "stopped");
}

TEST_F(Recall, ImpossibleTasksAreErrors) {
  EXPECT_THAT(error_of([&] { task(0); }), HasSubstr("0 texts"));
  EXPECT_THAT(error_of([&] { task(1, 4, 5); }), HasSubstr("5 questions cannot be asked about 4"));
  EXPECT_THAT(error_of([&] { facts_task(tasks_, {.context = 300}); }),
              HasSubstr("give a longer context or fewer facts"));
  EXPECT_THAT(error_of([&] { facts_task(tasks_, {.context = 1 << 20}); }),
              HasSubstr("source prose has"));
  EXPECT_THAT(error_of([&] { repeat_task(tasks_, 1000, 0); }), HasSubstr("0 repeated passages"));
  EXPECT_THAT(error_of([&] { repeat_task(tasks_, 20, 1); }), HasSubstr("too short to repeat"));
}

TEST_F(Recall, OnlyTheRepetitionIsScored) {
  const auto model = random_model();
  const RepeatTask task = repeat_task(tasks_, 700, 3);
  const PerplexityResult result = repeat(*model, std::make_unique<KeepAll>(), task);
  // The definition: a dense pass, and the repeated tokens' probabilities.
  std::vector<double> sums;
  double nll = 0, count = 0;
  for (const Window& window : task.windows) {
    const auto& text = task.texts[window.stream];
    EXPECT_EQ(window.first_scored, tasks_.repeated_passage(700, window.stream).first);
    std::vector<int64_t> ids(text.begin(), text.end());
    const at::NoGradGuard no_grad;
    models::TrainingInput input;
    input.tokens = at::from_blob(ids.data(), {1, std::ssize(ids)}, at::kLong);
    input.sample = false;
    const at::Tensor scores = at::log_softmax(model->forward(input).logits[0], -1);
    for (int64_t i = window.first_scored; i < std::ssize(ids); ++i) {
      nll -= scores[i - 1][ids[i]].item<double>();
      ++count;
    }
  }
  EXPECT_EQ(result.tokens, static_cast<int64_t>(count));
  EXPECT_EQ(result.windows, 3);
  EXPECT_NEAR(result.nll, nll / count, 1e-4);
  EXPECT_EQ(result.kv_end, 1);
  EXPECT_GT(result.nll_error, 0);
  const PerplexityResult less = repeat(*model, std::make_unique<KeepNothing>(), task);
  EXPECT_GT(std::abs(less.nll - result.nll), 1e-3);
}

TEST(Runs, TheStandardErrorIsThatOfAMeanWhereGroupsAreEqual) {
  const std::vector<double> sums{1, 0, 1, 1, 0}, ones(5, 1.0);
  // Sample variance 0.3 over five draws.
  EXPECT_NEAR(standard_error(sums, ones), std::sqrt(0.3 / 5), 1e-12);
  // The same draws, each counted twice: nothing was learned by asking again.
  const std::vector<double> twice{2, 0, 2, 2, 0}, twos(5, 2.0);
  EXPECT_NEAR(standard_error(twice, twos), std::sqrt(0.3 / 5), 1e-12);
  EXPECT_EQ(standard_error(std::vector<double>{3}, std::vector<double>{5}), 0);
}

TEST(EngineOptions, LetInAsManyWindowsAsTheirLogitsAndTheirCachesAllow) {
  const testing::SmallModel model;
  const models::Config& c = model.config();
  const auto windows = [&](const PerplexityOptions& options) {
    const engine::Options settings = engine_options(model, options);
    EXPECT_EQ(settings.max_step_rows, settings.max_sequences * options.prefill_chunk);
    return settings.max_sequences;
  };
  EXPECT_EQ(windows({.context = 128, .prefill_chunk = 64}), 16);
  EXPECT_EQ(windows({.context = 128, .prefill_chunk = 2000}), 1);
  EXPECT_EQ(windows({.context = 128, .prefill_chunk = 2000, .batch = 3}), 3);
  const int64_t token_bytes = 2 * sizeof(float) * c.layers * c.kv_heads * c.head_dim;
  const auto context = static_cast<int32_t>((int64_t{4} << 30) / token_bytes / 2);
  EXPECT_EQ(windows({.context = context}), 2);
  EXPECT_EQ(windows({.context = context, .cache_dtype = at::kBFloat16}), 4);
  EXPECT_EQ(windows({.context = 3 * context}), 1);
}

TEST(Runs, MeansWeighSequencesByTheirTokensButTheirEndsEqually) {
  const engine::KeyUse uses[] = {{.tokens = 100,
                                  .kv_end = 0.5,
                                  .kv_mean = 0.6,
                                  .demoted = 3,
                                  .kv_peak_over_cap = 0.9,
                                  .kv_bytes_mean = 10,
                                  .kv_bytes_peak = 30},
                                 {.tokens = 300,
                                  .kv_end = 0.1,
                                  .kv_mean = 0.2,
                                  .demoted = 4,
                                  .kv_peak_over_cap = 0.8,
                                  .kv_bytes_mean = 20,
                                  .kv_bytes_peak = 25}};
  const KeyMeans means = means_of(uses, 300);
  EXPECT_EQ(means.demoted, 7);
  EXPECT_EQ(means.kv_peak_over_cap, 0.9);
  EXPECT_NEAR(means.kv_end, 0.3, 1e-12);
  EXPECT_NEAR(means.kv_end_full, 0.1, 1e-12);
  EXPECT_NEAR(means.kv_mean, 0.3, 1e-12);
  EXPECT_NEAR(means.kv_bytes_mean, 17.5, 1e-12);
  EXPECT_EQ(means.kv_bytes_peak, 30);
  EXPECT_EQ(means.tokens, 400);
  EXPECT_NEAR(means_of(uses).kv_end_full, 0.3, 1e-12);
}

}  // namespace
}  // namespace natslm::eval
