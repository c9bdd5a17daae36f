// How recall tasks (recall_tasks.h) are put together: draws, facts as token ids, places in a text
// where a sentence can stand. Stateless: whatever is drawn depends on the draws handed in.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/data/recall_words.h"
#include "natslm/data/tokenizer.h"

namespace natslm::data {

// The draws of one sample: a pure function of (seed, number).
class Draws {
 public:
  Draws(uint64_t seed, int64_t number) : key_(mix64(seed)), number_(number) {}
  int64_t below(int64_t count);  // uniform in [0, count)
  double unit();                 // uniform in [0, 1)
  template <class Range>
  const auto& pick(const Range& range) {
    return range[below(std::ssize(range))];
  }
  // `count` different numbers of [0, size), in random order.
  std::vector<int64_t> different(int64_t count, int64_t size);

 private:
  uint64_t word();
  uint64_t key_;
  int64_t number_;
  uint32_t drawn_ = 0;
};

// Something to be written into a text and asked for at its end. The answer follows the question
// directly.
struct Planted {
  std::vector<int32_t> statement, question, answer;
  std::string question_text, answer_text;  // the latter without the space before it
  int64_t asked_size() const { return std::ssize(question) + std::ssize(answer); }
};

class RecallWriter {
 public:
  explicit RecallWriter(const Tokenizer& tokenizer);  // must outlive this

  // Ids of text that follows a word: without what a tokenizer puts before a text's first word.
  std::vector<int32_t> continuation(std::string_view text) const;

  // Facts about different subjects with different values, half of them numbers of 4 to 7 digits.
  std::vector<Planted> facts(WordSet set, int32_t count, Draws& draws) const;
  // Lists of code words, numbered from "first" on, each word drawn from the spelling alphabet.
  std::vector<Planted> passkeys(int32_t count, int32_t words, Draws& draws) const;

  // The place (insert before it) nearest behind `at`, else before it, where a sentence ends and
  // white space follows; where there is none within some hundred tokens, one before a word.
  int64_t sentence_end(std::span<const int32_t> text, int64_t at) const;
  // The first place in [at, limit] before a word, but not far from `at`; else `at`.
  int64_t word_start(std::span<const int32_t> text, int64_t at, int64_t limit) const;

 private:
  Planted planted(std::string_view statement, const std::string& question,
                  const std::string& answer) const;
  enum : uint8_t { kEndsSentence = 1, kBeginsWord = 2 };
  bool is(int32_t id, uint8_t flag) const { return (flags_[id] & flag) != 0; }

  const Tokenizer& tokenizer_;
  std::vector<uint8_t> flags_;  // [vocabulary]
};

// `text` with the statements put in, each before the token its place names (at the end: the text's
// size); places in any order.
std::vector<int32_t> plant(std::span<const int32_t> text, std::span<const Planted> statements,
                           std::span<const int64_t> places);

}  // namespace natslm::data
