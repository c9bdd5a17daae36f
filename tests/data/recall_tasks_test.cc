// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/recall_tasks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <sstream>

#include "tests/data/tokenizer_texts.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/some_prose.h"

namespace natslm::data {
namespace {

using test::ByteTokenizer;
using test::kSentences;
using test::some_prose;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using Ids = std::vector<int32_t>;

Ids slice(const Ids& ids, int64_t begin, int64_t end) {
  return {ids.begin() + begin, ids.begin() + end};
}

// A stretch of predicted tokens with the same weight.
struct Stretch {
  int64_t begin = 0, end = 0;
  float weight = 0;
};
std::vector<Stretch> stretches_of(const Sample& sample) {
  std::vector<Stretch> runs;
  for (int64_t i = 0; i < std::ssize(sample.weights); ++i) {
    const float weight = sample.weights[i];
    if (runs.empty() || runs.back().weight != weight) runs.push_back({i + 1, i + 1, weight});
    runs.back().end = i + 2;
  }
  return runs;
}

class RecallMix : public ::testing::Test {
 protected:
  TrainingMix mix(MixOptions options) const {
    return {bytes_, {{"prose", 1, {ids_}}}, {}, options};
  }
  std::string text(const Ids& ids) const { return bytes_.decode(ids); }
  std::string text(const Sample& sample, const Stretch& run) const {
    return text(slice(sample.tokens, run.begin, run.end));
  }
  ByteTokenizer bytes_;
  Ids ids_ = bytes_.encode(some_prose(30000));
};

TEST_F(RecallMix, ASampleDependsOnSeedAndNumberAlone) {
  const MixOptions options{.context = 1200, .passkeys = 0.3, .passkey_words = 4, .seed = 7};
  const TrainingMix one = mix(options), other = mix(options);
  std::vector<Sample> forwards(30);
  for (int64_t i = 0; i < 30; ++i) one.sample(i, forwards[i]);
  Sample sample;
  for (int64_t i = 29; i >= 0; --i) {
    other.sample(i, sample);
    EXPECT_EQ(sample.kind, forwards[i].kind);
    EXPECT_EQ(sample.tokens, forwards[i].tokens);
    EXPECT_EQ(sample.weights, forwards[i].weights);
  }
  EXPECT_NE(forwards[0].tokens, forwards[1].tokens);
  MixOptions reseeded = options;
  reseeded.seed = 8;
  mix(reseeded).sample(0, sample);
  EXPECT_NE(sample.tokens, forwards[0].tokens);
}

TEST_F(RecallMix, EachKindComesAsOftenAsItsShareSays) {
  const TrainingMix all =
      mix({.context = 600, .plain = 4, .repeat = 1, .facts = 3, .passkeys = 2, .passkey_words = 2});
  std::map<SampleKind, int> count;
  Sample sample;
  for (int64_t i = 0; i < 2000; ++i) {
    all.sample(i, sample);
    ++count[sample.kind];
  }
  // Three standard deviations of the largest are 66.
  EXPECT_NEAR(count[SampleKind::kPlain], 800, 70);
  EXPECT_NEAR(count[SampleKind::kRepeat], 200, 70);
  EXPECT_NEAR(count[SampleKind::kFacts], 600, 70);
  EXPECT_NEAR(count[SampleKind::kPasskeys], 400, 70);
}

TEST_F(RecallMix, EverySampleHasTheSameSizeAndBeginsAsTheTokenizerWants) {
  const auto golden = load_tokenizer(golden_folder() / "tokenizer.json");
  const auto llama = load_tokenizer(golden_folder() / "pipelines" / "llama.model");
  ASSERT_FALSE(llama->before_text().empty());
  for (const Tokenizer* tokenizer :
       {static_cast<const Tokenizer*>(&bytes_), static_cast<const Tokenizer*>(golden.get()),
        static_cast<const Tokenizer*>(llama.get())}) {
    const Ids ids = tokenizer->encode(some_prose(30000));
    for (const int64_t context : {800, 1333, 2048}) {
      const TrainingMix all(*tokenizer, {{"prose", 1, {ids}}}, {},
                            {.context = context, .passkeys = 0.3, .passkey_words = 5});
      Sample sample;
      for (int64_t i = 0; i < 60; ++i) {
        all.sample(i, sample);
        ASSERT_EQ(std::ssize(sample.tokens), context + 1) << name(sample.kind);
        ASSERT_EQ(std::ssize(sample.weights), context) << name(sample.kind);
        for (const int32_t id : sample.tokens) ASSERT_TRUE(id >= 0 && id < tokenizer->vocabulary());
        const Ids before = tokenizer->before_text();
        EXPECT_TRUE(std::ranges::equal(before, slice(sample.tokens, 0, std::ssize(before))));
      }
    }
  }
}

TEST_F(RecallMix, PlainTextIsAWindowOfASource) {
  const Ids other = bytes_.encode(std::string(2000, 'x'));
  const TrainingMix two(bytes_, {{"prose", 1, {ids_}}, {"x", 3, {other}}}, {},
                        {.context = 500, .plain = 1, .repeat = 0, .facts = 0});
  const std::string all = text(ids_);
  Sample sample;
  int from_other = 0;
  for (int64_t i = 0; i < 400; ++i) {
    two.sample(i, sample);
    const std::string window = text(sample.tokens);
    if (window == std::string(501, 'x')) {
      ++from_other;
    } else {
      ASSERT_NE(all.find(window), std::string::npos);
    }
    EXPECT_TRUE(std::ranges::all_of(sample.weights, [](float w) { return w == 1; }));
  }
  EXPECT_NEAR(from_other, 300, 30);
}

TEST_F(RecallMix, ARepeatedPassageStandsInTheTextAndItsInstructionWeighsNothing) {
  const TrainingMix repeats = mix({.context = 1500, .plain = 0, .repeat = 1, .facts = 0});
  std::set<size_t> passages;
  Sample sample;
  for (int64_t i = 0; i < 40; ++i) {
    repeats.sample(i, sample);
    const std::vector<Stretch> runs = stretches_of(sample);
    const std::string before = sample.tokens.empty() ? "" : text(slice(sample.tokens, 0, 1));
    ASSERT_EQ(runs[0].weight, 0.3f);
    const std::string whole = before + text(sample, runs[0]);
    EXPECT_NE(text(ids_).find(whole), std::string::npos);
    ASSERT_EQ(runs.size() % 2, 1u);
    for (size_t r = 1; r < runs.size(); r += 2) {
      EXPECT_EQ(runs[r].weight, 0);
      EXPECT_EQ(runs[r + 1].weight, 1);
      const std::string instruction = text(sample, runs[r]), passage = text(sample, runs[r + 1]);
      EXPECT_NE(whole.find(passage), std::string::npos) << passage;
      EXPECT_THAT(instruction, HasSubstr(passage.substr(0, 8)));
      EXPECT_THAT(instruction, StartsWith("\n\n"));
      EXPECT_GE(passage.size(), 64u);
      EXPECT_LE(passage.size(), 256u);
    }
    passages.insert((runs.size() - 1) / 2);
  }
  EXPECT_GT(passages.size(), 1u);  // sometimes several
}

TEST_F(RecallMix, TheWeightOfAnAnswerLiesOnItsTokensAlone) {
  const auto golden = load_tokenizer(golden_folder() / "tokenizer.json");
  const auto llama = load_tokenizer(golden_folder() / "pipelines" / "llama.model");
  const auto values = recall_words(WordSet::kTraining).values;
  for (const Tokenizer* tokenizer :
       {static_cast<const Tokenizer*>(&bytes_), static_cast<const Tokenizer*>(golden.get()),
        static_cast<const Tokenizer*>(llama.get())}) {
    const Ids ids = tokenizer->encode(some_prose(30000));
    const TrainingMix facts(*tokenizer, {{"prose", 1, {ids}}}, {},
                            {.context = 1800, .plain = 0, .repeat = 0, .facts = 1});
    std::set<std::string> answers;
    size_t most = 0;
    Sample sample;
    for (int64_t i = 0; i < 60; ++i) {
      facts.sample(i, sample);
      std::vector<Stretch> runs = stretches_of(sample);
      if (!tokenizer->before_text().empty() && runs[0].weight == 0) runs.erase(runs.begin());
      ASSERT_EQ(runs[0].weight, 0.1f);
      const std::string carrier =
          tokenizer->decode(slice(sample.tokens, runs[0].begin, runs[0].end));
      ASSERT_EQ(runs.size() % 2, 1u);
      most = std::max(most, (runs.size() - 1) / 2);
      for (size_t r = 1; r < runs.size(); r += 2) {
        EXPECT_EQ(runs[r].weight, 0);
        ASSERT_EQ(runs[r + 1].weight, 20);
        Ids bytes = slice(sample.tokens, runs[r + 1].begin, runs[r + 1].end);
        std::string answer;
        for (const int32_t id : bytes) answer += tokenizer->token_bytes(id);
        ASSERT_THAT(answer, StartsWith(" "));
        answer.erase(0, 1);
        const bool number = answer.find_first_not_of("0123456789") == std::string::npos;
        EXPECT_TRUE(number ? answer.size() >= 4 && answer.size() <= 7
                           : std::ranges::count(values, answer) == 1)
            << answer;
        EXPECT_THAT(carrier, HasSubstr(answer));
        answers.insert(answer);
      }
    }
    EXPECT_GT(answers.size(), 50u);
    EXPECT_EQ(most, 4u);
  }
}

TEST_F(RecallMix, FactsStandBetweenSentences) {
  const TrainingMix facts = mix({.context = 2000, .plain = 0, .repeat = 0, .facts = 1});
  Sample sample;
  std::set<size_t> counts;
  for (int64_t i = 0; i < 60; ++i) {
    facts.sample(i, sample);
    std::string carrier = text(sample, stretches_of(sample)[0]);
    size_t planted = 0;
    // After the first sentence, which the window may have cut.
    size_t begin = carrier.find_first_of(".!?") + 1;
    while (begin < carrier.size()) {
      const size_t end = carrier.find_first_of(".!?", begin);
      if (end == std::string::npos) break;  // cut
      std::string sentence = carrier.substr(begin, end + 1 - begin);
      sentence.erase(0, sentence.find_first_not_of(" \n"));
      if (std::ranges::count(kSentences, sentence) == 0) {
        ++planted;
        EXPECT_TRUE(std::ranges::any_of(recall_words(WordSet::kTraining).subjects,
                                        [&](std::string_view subject) {
                                          return sentence.find(subject.substr(1)) !=
                                                 std::string::npos;
                                        }))
            << sentence;
      }
      begin = end + 1;
    }
    EXPECT_LE(planted, 8u);
    counts.insert(planted);
  }
  EXPECT_GT(counts.size(), 4u);
}

TEST_F(RecallMix, OnlyTheListsThatPasskeysAskForHaveWeight) {
  const TrainingMix lists = [&] {
    MixOptions options = passkey_mix(8192, 3);
    options.passkey_words = 12;
    return mix(options);
  }();
  Sample sample;
  for (int64_t i = 0; i < 5; ++i) {
    lists.sample(i, sample);
    const std::vector<Stretch> runs = stretches_of(sample);
    ASSERT_EQ(runs.size(), 20u);
    const std::string carrier = text(sample, runs[0]);
    for (size_t r = 1; r < runs.size(); r += 2) {
      EXPECT_EQ(runs[r].weight, 1);
      const std::string list = text(sample, runs[r]);
      EXPECT_EQ(std::ranges::count(list, ','), 11);
      const size_t at = carrier.find(list.substr(1) + ".");
      ASSERT_NE(at, std::string::npos);
      EXPECT_GT(at, carrier.size() / 50);
      EXPECT_THAT(carrier.substr(0, at),
                  HasSubstr(std::string(ordinals()[(r - 1) / 2]) + " key to the safe"));
    }
  }
}

TEST_F(RecallMix, AShortContextHasFewerFactsAndPasskeys) {
  Sample sample;
  const TrainingMix facts = mix({.context = 400, .plain = 0, .repeat = 0, .facts = 1});
  for (int64_t i = 0; i < 100; ++i) facts.sample(i, sample);
  MixOptions options = passkey_mix(400, 3);
  options.passkey_words = 3;
  const TrainingMix lists = mix(options);
  lists.sample(0, sample);
  const size_t runs = stretches_of(sample).size();
  EXPECT_GE(runs, 2u);
  EXPECT_LT(runs, 20u);
}

TEST_F(RecallMix, WhatCannotBeMadeIsAnErrorAtOnce) {
  const auto error = [&](const MixOptions& options) { return error_of([&] { mix(options); }); };
  EXPECT_THAT(error({.context = 30000 - 100 + 200}),
              HasSubstr("source prose has " + std::to_string(ids_.size()) +
                        " tokens, a sample takes 30101: give more text or a shorter context"));
  EXPECT_THAT(error({.context = 40, .plain = 0, .repeat = 1, .facts = 0}),
              HasSubstr("a context of 40 tokens is too short to repeat a passage"));
  EXPECT_THAT(error({.context = 100, .plain = 0, .repeat = 0, .facts = 1}),
              HasSubstr("a context of 100 tokens is too short to plant a fact"));
  EXPECT_THAT(error(passkey_mix(300, 1)),
              HasSubstr("a context of 300 tokens is too short for a passkey of 32 words"));
  EXPECT_THAT(error({.plain = 0, .repeat = 0, .facts = 0}), HasSubstr("every share is 0"));
  EXPECT_THAT(error({.plain = -1}), HasSubstr("the share of plain text is -1"));
  EXPECT_THAT(error({.answer_weight = -2}), HasSubstr("the weight of answers is -2"));
  EXPECT_THAT(error({.most_facts = 33}), HasSubstr("33 facts"));
  EXPECT_THAT(error({.passkey_lists = 21}), HasSubstr("21 passkeys"));
  EXPECT_THAT(error_of([&] { TrainingMix(bytes_, {}, {}, {}); }), HasSubstr("no text was given"));
  EXPECT_THAT(error_of([&] {
                TrainingMix(bytes_, {{"prose", 0, {ids_}}}, {}, {});
              }),
              HasSubstr("every source has the weight 0"));
  EXPECT_THAT(error_of([&] {
                Sample sample;
                mix({.context = 1500}).sample(-1, sample);
              }),
              HasSubstr("sample -1"));
}

TEST(RecallWords, TrainingAndEvaluationShareNothing) {
  const RecallWords& train = recall_words(WordSet::kTraining);
  const RecallWords& eval = recall_words(WordSet::kEvaluation);
  EXPECT_GE(train.facts.size(), 12u);
  EXPECT_GE(train.subjects.size(), 60u);
  EXPECT_GE(train.values.size(), 60u);
  const auto words_of = [](const RecallWords& words) {
    std::set<std::string> result;
    for (const auto list : {words.word_things, words.number_things, words.subjects, words.values}) {
      for (const std::string_view entry : list) {
        std::istringstream split{std::string(entry)};
        for (std::string word; split >> word;) {
          if (word != "the") result.insert(word);
        }
      }
    }
    return result;
  };
  for (const std::string& word : words_of(eval)) EXPECT_EQ(words_of(train).count(word), 0u) << word;
  std::set<std::string_view> templates;
  for (const FactTemplate& form : train.facts) templates.insert(form.statement);
  EXPECT_EQ(templates.size(), train.facts.size());
  for (const FactTemplate& form : eval.facts) EXPECT_TRUE(templates.insert(form.statement).second);
  for (const auto& a : train.questions) {
    for (const auto& b : eval.questions) EXPECT_NE(a.opening, b.opening);
  }
  for (const auto& a : train.repeats) {
    for (const auto& b : eval.repeats) EXPECT_NE(a.before, b.before);
  }
  for (const RecallWords* words : {&train, &eval}) {
    for (const auto list : {words->subjects, words->values}) {
      EXPECT_EQ(std::set<std::string_view>(list.begin(), list.end()).size(), list.size());
    }
    for (const FactTemplate& form : words->facts) {
      for (const std::string_view hole : {"{thing}", "{subject}", "{value}"}) {
        EXPECT_THAT(std::string(form.statement), HasSubstr(std::string(hole)));
      }
      // An answer begins with a space: what stands before it ends without one.
      EXPECT_FALSE(form.lead.empty() || form.lead.ends_with(' ')) << form.lead;
      EXPECT_EQ(form.lead.find("{value}"), std::string::npos);
      EXPECT_EQ(form.question.find("{value}"), std::string::npos);
      EXPECT_TRUE(form.question.find("{subject}") != std::string::npos);
    }
  }
}

class RecallEvaluation : public RecallMix {
 protected:
  RecallTasks tasks_{bytes_, {"prose", 1, {ids_}}, 5};
};

TEST_F(RecallEvaluation, EveryFactStandsInTheContextAndFitsWithItsQuestion) {
  const RecallWords& words = recall_words(WordSet::kEvaluation);
  for (int64_t number = 0; number < 20; ++number) {
    const PlantedFacts facts = tasks_.planted_facts(8, 2000, number);
    const std::string context = text(facts.context);
    ASSERT_EQ(facts.questions.size(), 8u);
    size_t longest = 0;
    std::set<std::string> questions;
    for (const auto& question : facts.questions) {
      EXPECT_EQ(text(question.tokens), question.text);
      EXPECT_EQ(context.find(question.answer), context.rfind(question.answer)) << question.answer;
      EXPECT_THAT(context, HasSubstr(question.answer));
      const auto about = std::ranges::find_if(words.subjects, [&](std::string_view subject) {
        return question.text.find(subject) != std::string::npos;
      });
      ASSERT_NE(about, words.subjects.end()) << question.text;
      const size_t begin = context.find_last_of(".!?\n", context.find(question.answer) - 1);
      EXPECT_THAT(context.substr(begin, 160), HasSubstr(std::string(about->substr(1))));
      questions.insert(question.text);
      longest = std::max(longest, question.tokens.size());
    }
    EXPECT_EQ(questions.size(), 8u);
    EXPECT_EQ(facts.context.size() + longest, 2000u);
  }
}

TEST_F(RecallEvaluation, TheSameSeedAndNumberGiveTheSame) {
  const RecallTasks again(bytes_, {"prose", 1, {ids_}}, 5), other(bytes_, {"prose", 1, {ids_}}, 6);
  EXPECT_EQ(tasks_.planted_facts(4, 2000, 3).context, again.planted_facts(4, 2000, 3).context);
  EXPECT_NE(tasks_.planted_facts(4, 2000, 3).context, tasks_.planted_facts(4, 2000, 4).context);
  EXPECT_NE(tasks_.planted_facts(4, 2000, 3).context, other.planted_facts(4, 2000, 3).context);
  EXPECT_EQ(tasks_.repeated_passage(1000, 3).tokens, again.repeated_passage(1000, 3).tokens);
  EXPECT_NE(tasks_.repeated_passage(1000, 3).tokens, other.repeated_passage(1000, 3).tokens);
}

TEST_F(RecallEvaluation, TheEndOfATextRepeatsAPassageOfIt) {
  for (int64_t number = 0; number < 20; ++number) {
    const RepeatedPassage repeated = tasks_.repeated_passage(1500, number);
    ASSERT_EQ(repeated.tokens.size(), 1500u);
    const std::string all = text(repeated.tokens);
    const std::string passage = all.substr(repeated.first);
    EXPECT_GE(passage.size(), 128u);
    EXPECT_LE(passage.size(), 256u);
    EXPECT_LT(all.find(passage) + passage.size(), static_cast<size_t>(repeated.first));
    EXPECT_TRUE(std::ranges::any_of(
        recall_words(WordSet::kEvaluation).repeats, [&](const RepeatForm& form) {
          return all.substr(0, repeated.first)
              .ends_with(passage.substr(0, 8) + std::string(form.after));
        }));
  }
}

TEST_F(RecallEvaluation, WhatDoesNotFitIsAnError) {
  EXPECT_THAT(error_of([&] { tasks_.planted_facts(8, 600, 0); }),
              HasSubstr("give a longer context or fewer facts"));
  EXPECT_THAT(error_of([&] { tasks_.planted_facts(0, 2000, 0); }), HasSubstr("0 planted facts"));
  EXPECT_THAT(error_of([&] { tasks_.planted_facts(8, 50000, 0); }),
              HasSubstr("source prose has " + std::to_string(ids_.size())));
  EXPECT_THAT(error_of([&] { tasks_.repeated_passage(50000, 0); }), HasSubstr("source prose has"));
  EXPECT_THAT(error_of([&] { tasks_.repeated_passage(50, 0); }), HasSubstr("too short to repeat"));
}

TEST(RecallSource, DocumentsAreJoinedWithOneSeparatorBetweenThem) {
  const ScratchFolder folder;
  PackedTokensWriter writer(folder / "packed", 100, 1);
  const Ids packed{7, 8, 99}, first{1, 2, 3}, empty, last{4, 5};
  writer.append(packed.data(), 3);
  writer.commit();
  const JoinedText text({"mixed", 1, {first, empty, PackedTokens(folder / "packed"), last}}, 99);
  const Ids all{1, 2, 3, 99, 7, 8, 99, 4, 5};
  ASSERT_EQ(text.size(), std::ssize(all));
  for (int64_t begin = 0; begin <= text.size(); ++begin) {
    for (int64_t end = begin; end <= text.size(); ++end) {
      Ids out(end - begin);
      text.read(begin, end - begin, out.data());
      EXPECT_EQ(out, slice(all, begin, end));
    }
  }
  const JoinedText close({"mixed", 1, {first, last}}, -1);
  Ids out(5);
  close.read(0, 5, out.data());
  EXPECT_EQ(out, (Ids{1, 2, 3, 4, 5}));
}

TEST(RecallDraws, AreUniformAndDifferent) {
  Draws draws(1, 2);
  std::vector<int> count(7);
  for (int i = 0; i < 7000; ++i) ++count[draws.below(7)];
  for (const int n : count) EXPECT_NEAR(n, 1000, 120);  // four standard deviations
  for (int i = 0; i < 100; ++i) {
    std::vector<int64_t> some = draws.different(5, 9);
    std::ranges::sort(some);
    EXPECT_TRUE(std::ranges::adjacent_find(some) == some.end());
    EXPECT_GE(some.front(), 0);
    EXPECT_LT(some.back(), 9);
  }
}

}  // namespace
}  // namespace natslm::data
