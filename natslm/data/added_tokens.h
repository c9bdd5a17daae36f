// Added tokens: whole strings that have an id of their own ("<|endoftext|>"), found in the text
// before it is cut into pieces. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace natslm::data {

struct AddedToken {
  int32_t id = 0;
  std::string content;       // its bytes in the text
  bool special = true;       // a control token rather than text; kept for tokenizer.json
  bool normalized = false;   // looked for after those that are not, in normalised text
  bool left_strip = false;   // takes the white space before it
  bool right_strip = false;  // takes the white space after it
  bool single_word = false;  // not where a word character stands before or after it
};

// Id of the token that separates documents, by the names that models give it, or -1.
int32_t end_of_text_among(const std::vector<AddedToken>& added);

// Finds the leftmost match, the longest of those that begin there.
class AddedTokenFinder {
 public:
  // `pattern`: what stands for the token in the text, not empty.
  void add(const AddedToken& token, std::string pattern);
  void add(const AddedToken& token) { add(token, token.content); }
  bool empty() const { return longest_ == 0; }

  // Calls plain(text between) and found(id) in the order of the text; no text between is empty.
  template <class Plain, class Found>
  void split(std::string_view text, Plain&& plain, Found&& found) const {
    if (empty()) {
      if (!text.empty()) plain(text);
      return;
    }
    size_t done = 0;  // up to here plain() and found() were told
    for (Match match = next(text, 0); match.pattern; match = next(text, match.end)) {
      if (!widen(text, done, match)) continue;
      if (done < match.begin) plain(text.substr(done, match.begin - done));
      found(match.pattern->id);
      done = match.wide_end;
    }
    if (done < text.size()) plain(text.substr(done));
  }

  // Could a token reach across text[at], the text going on as it may?
  bool may_cross(std::string_view text, size_t at) const;

 private:
  struct Pattern {
    std::string text;
    int32_t id;
    bool left_strip, right_strip, single_word;
  };
  struct Match {
    const Pattern* pattern = nullptr;
    size_t begin = 0, end = 0, wide_end = 0;
  };

  Match next(std::string_view text, size_t at) const;
  // Applies what the token says about its surroundings; false: they forbid the match.
  bool widen(std::string_view text, size_t done, Match& match) const;
  const std::vector<Pattern>& group(char first) const {
    return patterns_[static_cast<unsigned char>(first)];
  }

  std::array<std::vector<Pattern>, 256> patterns_;  // by first byte, sorted
  std::string first_bytes_;
  size_t longest_ = 0;
  bool strips_ = false;
};

}  // namespace natslm::data
