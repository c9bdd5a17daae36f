// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/recall_writer.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "natslm/base/error.h"

namespace natslm::data {
namespace {

constexpr int64_t kNear = 256;     // tokens that a sentence's end is looked for in
constexpr int64_t kNearWord = 32;  // and a word's beginning
// A letter that no rule joins with what follows it: white space.
constexpr std::string_view kWord = "a";

std::string replaced(std::string_view text, std::string_view name, std::string_view by) {
  std::string result(text);
  for (size_t at = 0; (at = result.find(name, at)) != std::string::npos; at += by.size()) {
    result.replace(at, name.size(), by);
  }
  return result;
}

std::string sentence(std::string text) {
  if (!text.empty() && text[0] >= 'a' && text[0] <= 'z') text[0] -= 'a' - 'A';
  return text;
}

size_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

bool ends_sentence(std::string_view bytes) {
  while (!bytes.empty() && std::string_view("\"')]*_").find(bytes.back()) != std::string_view::npos)
    bytes.remove_suffix(1);
  return !bytes.empty() && std::string_view(".!?").find(bytes.back()) != std::string_view::npos;
}

}  // namespace

uint64_t Draws::word() {
  const auto words =
      philox({static_cast<uint32_t>(key_), static_cast<uint32_t>(key_ >> 32)},
             {static_cast<uint32_t>(number_), static_cast<uint32_t>(number_ >> 32), drawn_++, 0});
  return uint64_t{words[0]} << 32 | words[1];
}

int64_t Draws::below(int64_t count) {
  NATSLM_ASSERT(count > 0);
  // The high half of the product: biased by less than count / 2^64.
  __extension__ using Wide = unsigned __int128;
  return static_cast<int64_t>(Wide{word()} * static_cast<uint64_t>(count) >> 64);
}

double Draws::unit() {
  return static_cast<double>(word() >> 11) * 0x1p-53;
}

std::vector<int64_t> Draws::different(int64_t count, int64_t size) {
  NATSLM_ASSERT(count <= size);
  std::vector<int64_t> all(size);
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < count; ++i) std::swap(all[i], all[i + below(size - i)]);
  all.resize(count);
  return all;
}

RecallWriter::RecallWriter(const Tokenizer& tokenizer)
    : tokenizer_(tokenizer), flags_(tokenizer.vocabulary()) {
  for (int32_t id = 0; id < tokenizer.vocabulary(); ++id) {
    const std::string bytes = tokenizer.token_bytes(id);
    if (ends_sentence(bytes)) flags_[id] |= kEndsSentence;
    if (bytes.starts_with(' ') || bytes.starts_with('\n')) flags_[id] |= kBeginsWord;
  }
}

std::vector<int32_t> RecallWriter::continuation(std::string_view text) const {
  const std::vector<int32_t> word = tokenizer_.encode(kWord);
  std::vector<int32_t> ids = tokenizer_.encode(std::string(kWord).append(text));
  if (common_prefix(word, ids) < word.size()) return tokenizer_.encode(text);
  ids.erase(ids.begin(), ids.begin() + std::ssize(word));
  return ids;
}

Planted RecallWriter::planted(std::string_view statement, const std::string& question,
                              const std::string& answer) const {
  Planted result;
  result.statement = continuation(statement);
  result.question_text = question;
  result.answer_text = answer;
  // Where the tokens of the two are not those of each alone, the answer begins with the first
  // that differs.
  result.question = continuation(question);
  const std::vector<int32_t> both = continuation(question + " " + answer);
  const auto shared = static_cast<int64_t>(common_prefix(result.question, both));
  result.question.resize(shared);
  result.answer.assign(both.begin() + shared, both.end());
  return result;
}

std::vector<Planted> RecallWriter::facts(WordSet set, int32_t count, Draws& draws) const {
  const RecallWords& words = recall_words(set);
  const std::vector<int64_t> subjects = draws.different(count, std::ssize(words.subjects));
  const std::vector<int64_t> values = draws.different(count, std::ssize(words.values));
  std::vector<Planted> result;
  std::vector<std::string> numbers;
  for (int32_t i = 0; i < count; ++i) {
    const bool number = draws.below(2) == 1;
    std::string value(words.values[values[i]]);
    while (number) {
      const auto digits = static_cast<size_t>(4 + draws.below(4));
      value = std::to_string(1 + draws.below(9));
      while (value.size() < digits) value += std::to_string(draws.below(10));
      if (std::ranges::count(numbers, value) == 0) break;
    }
    if (number) numbers.push_back(value);
    const std::string_view thing = draws.pick(number ? words.number_things : words.word_things);
    const FactTemplate& form = draws.pick(words.facts);
    const auto fill = [&](std::string_view text) {
      return sentence(replaced(
          replaced(replaced(text, "{thing}", thing), "{subject}", words.subjects[subjects[i]]),
          "{value}", value));
    };
    const QuestionForm& ask = draws.pick(words.questions);
    result.push_back(planted(
        " " + fill(form.statement),
        std::string(ask.opening) + fill(form.question) + std::string(ask.between) + fill(form.lead),
        value));
  }
  return result;
}

std::vector<Planted> RecallWriter::passkeys(int32_t count, int32_t words, Draws& draws) const {
  std::vector<Planted> result;
  const PasskeyForm& form = passkey_form();
  for (int32_t i = 0; i < count; ++i) {
    std::string list;
    for (int32_t word = 0; word < words; ++word) {
      if (word > 0) list += ", ";
      list += draws.pick(spelling_alphabet());
    }
    const std::string_view ordinal = ordinals()[i];
    result.push_back(
        planted(replaced(replaced(form.statement, "{ordinal}", ordinal), "{words}", list),
                replaced(form.question, "{ordinal}", ordinal), list));
  }
  return result;
}

int64_t RecallWriter::sentence_end(std::span<const int32_t> text, int64_t at) const {
  const int64_t size = std::ssize(text);
  const auto word = [&](int64_t place) { return place == size || is(text[place], kBeginsWord); };
  const auto end = [&](int64_t place) { return is(text[place - 1], kEndsSentence) && word(place); };
  const auto near = [&](const auto& good) -> int64_t {
    for (int64_t i = std::max<int64_t>(at, 1); i <= std::min(size, at + kNear); ++i) {
      if (good(i)) return i;
    }
    for (int64_t i = std::min(size, at - 1); i >= std::max<int64_t>(1, at - kNear); --i) {
      if (good(i)) return i;
    }
    return -1;
  };
  int64_t place = near(end);
  if (place < 0) place = near(word);
  return place < 0 ? at : place;
}

int64_t RecallWriter::word_start(std::span<const int32_t> text, int64_t at, int64_t limit) const {
  for (int64_t i = at; i <= std::min(limit, at + kNearWord); ++i) {
    if (i == 0 || is(text[i], kBeginsWord)) return i;
  }
  return at;
}

std::vector<int32_t> plant(std::span<const int32_t> text, std::span<const Planted> statements,
                           std::span<const int64_t> places) {
  NATSLM_ASSERT(statements.size() == places.size());
  std::vector<size_t> order(statements.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](size_t i) { return places[i]; });
  std::vector<int32_t> result;
  int64_t at = 0;
  for (const size_t i : order) {
    result.insert(result.end(), text.begin() + at, text.begin() + places[i]);
    at = places[i];
    result.insert(result.end(), statements[i].statement.begin(), statements[i].statement.end());
  }
  result.insert(result.end(), text.begin() + at, text.end());
  return result;
}

}  // namespace natslm::data
