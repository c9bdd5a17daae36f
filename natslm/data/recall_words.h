// The words of the recall tasks (recall_tasks.h): sentences that state facts and ask for them, the
// things, subjects and values they are about, instructions. Two sets with nothing in common, so
// that what a model learned on one is measured on the other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace natslm::data {

// {thing}, {subject} and {value} are replaced.
struct FactTemplate {
  std::string_view statement;  // a sentence: "The {thing} of {subject} is {value}."
  std::string_view question;   // "What is the {thing} of {subject}?"
  std::string_view lead;       // the answer up to its value: "The {thing} of {subject} is"
};

// How a question and the beginning of its answer follow the text: opening, question, between, lead.
struct QuestionForm {
  std::string_view opening, between;
};

// before, the passage's first tokens, after, the passage.
struct RepeatForm {
  std::string_view before, after;
};

// How a list of code words is stated and asked for; {ordinal} is "first", "second", ...
struct PasskeyForm {
  std::string_view statement;  // {words} is the list
  std::string_view question;   // ends where the list begins
};

struct RecallWords {
  std::span<const FactTemplate> facts;
  std::span<const QuestionForm> questions;
  std::span<const RepeatForm> repeats;
  std::span<const std::string_view> word_things;    // what has a word for its value
  std::span<const std::string_view> number_things;  // what has a number
  std::span<const std::string_view> subjects;       // places and persons
  std::span<const std::string_view> values;         // words
};

enum class WordSet : uint8_t { kTraining, kEvaluation };
const RecallWords& recall_words(WordSet set);

// Alpha ... Zulu, in lower case: the spelling alphabet of radio telephony.
std::span<const std::string_view> spelling_alphabet();
const PasskeyForm& passkey_form();
// "first" ... "twentieth".
std::span<const std::string_view> ordinals();

}  // namespace natslm::data
