// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/added_tokens.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data {
namespace {

// Where the run of white space that ends at `at` begins, and where the one from `at` on ends.
size_t space_before(std::string_view text, size_t at) {
  while (at > 0) {
    const Char c = char_before(text, at);
    if (c.kind != CharClass::kSpace) break;
    at -= c.bytes;
  }
  return at;
}

size_t space_after(std::string_view text, size_t at) {
  while (at < text.size()) {
    const Char c = char_at(text, at);
    if (c.kind != CharClass::kSpace) break;
    at += c.bytes;
  }
  return at;
}

bool word_before(std::string_view text, size_t at) {
  return at > 0 && is_word(code_point_at(text, at - char_before(text, at).bytes));
}

bool word_after(std::string_view text, size_t at) {
  return at < text.size() && is_word(code_point_at(text, at));
}

// The part of a sorted range whose texts have `byte` at `place`.
template <class Iterator>
std::pair<Iterator, Iterator> with_byte(Iterator first, Iterator last, size_t place, char byte) {
  const auto key = [place](const auto& pattern) {
    return place < pattern.text.size() ? static_cast<unsigned char>(pattern.text[place]) : -1;
  };
  const int wanted = static_cast<unsigned char>(byte);
  first = std::partition_point(first, last, [&](const auto& p) { return key(p) < wanted; });
  last = std::partition_point(first, last, [&](const auto& p) { return key(p) == wanted; });
  return {first, last};
}

}  // namespace

int32_t end_of_text_among(const std::vector<AddedToken>& added) {
  // GPT-2 and many after it, Llama 3, SentencePiece's default, Gemma.
  for (const std::string_view name : {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"}) {
    const auto found = std::ranges::find(added, name, &AddedToken::content);
    if (found != added.end()) return found->id;
  }
  return -1;
}

void AddedTokenFinder::add(const AddedToken& token, std::string text) {
  NATSLM_CHECK(!text.empty(), "the added token with id ", token.id, " has no text to look for");
  const char first = text[0];
  longest_ = std::max(longest_, text.size());
  if (first_bytes_.find(first) == std::string::npos) first_bytes_ += first;
  strips_ |= token.left_strip || token.right_strip || token.single_word;
  auto& group = patterns_[static_cast<unsigned char>(first)];
  const auto place = std::ranges::lower_bound(group, text, {}, &Pattern::text);
  // Of two tokens that look the same in the text the first one counts.
  if (place != group.end() && place->text == text) return;
  group.insert(place,
               {std::move(text), token.id, token.left_strip, token.right_strip, token.single_word});
}

AddedTokenFinder::Match AddedTokenFinder::next(std::string_view text, size_t at) const {
  while (at < text.size()) {
    // The usual case, and memchr is much faster than a search for one of several.
    at = first_bytes_.size() == 1 ? text.find(first_bytes_[0], at)
                                  : text.find_first_of(first_bytes_, at);
    if (at == std::string_view::npos) break;
    const std::vector<Pattern>& candidates = group(text[at]);
    auto first = candidates.begin(), last = candidates.end();
    const Pattern* best = nullptr;
    for (size_t length = 1; first != last; ++length) {
      if (first->text.size() == length) best = &*first;  // the shortest comes first
      if (at + length == text.size()) break;
      std::tie(first, last) = with_byte(first, last, length, text[at + length]);
    }
    if (best) return {best, at, at + best->text.size(), 0};
    ++at;
  }
  return {};
}

bool AddedTokenFinder::widen(std::string_view text, size_t done, Match& match) const {
  const Pattern& pattern = *match.pattern;
  match.wide_end = match.end;
  if (pattern.single_word && (word_before(text, match.begin) || word_after(text, match.end))) {
    return false;
  }
  if (pattern.left_strip) match.begin = std::max(space_before(text, match.begin), done);
  if (pattern.right_strip) match.wide_end = space_after(text, match.end);
  return true;
}

bool AddedTokenFinder::may_cross(std::string_view text, size_t at) const {
  if (strips_) return true;  // white space on either side may belong to one
  for (size_t begin = at - std::min(at, longest_); begin < at; ++begin) {
    const std::vector<Pattern>& candidates = group(text[begin]);
    auto first = candidates.begin(), last = candidates.end();
    for (size_t length = 1; first != last; ++length) {
      if (begin + length == text.size()) return true;  // longer ones may follow
      if (begin + length > at && first->text.size() == length) return true;
      std::tie(first, last) = with_byte(first, last, length, text[begin + length]);
    }
  }
  return false;
}

}  // namespace natslm::data
