// How text is cut into the pieces that BPE works on (no token crosses a piece). Pieces are byte
// ranges that follow one another without a gap. Bytes that are not UTF-8 are kept: each run of them
// is a piece, and for the text on either side it is the end of the text. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace natslm::data {

// GPT-2's pattern, with the classes L, N and white space of Unicode 16 (unicode_classes.h).
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct SplitRule {
  bool digits = false;  // first, each character of class N becomes a piece of its own
  std::string pattern =
      std::string(kGpt2Pattern);  // a piece: what this matches, or what lies between
  bool operator==(const SplitRule&) const = default;
};

// GPT-2's pattern by hand. The tests compare it with PatternSplitter.
class Gpt2Splitter {
 public:
  explicit Gpt2Splitter(bool digits) : digits_(digits) {}
  // Writes the ends of the next pieces from the beginning of a piece on, at most `room` of them,
  // and returns how many; 0 at the end of the text.
  size_t split(std::string_view text, size_t from, size_t* ends, size_t room) const;
  // A length n < min(below, text.size()), the largest found in the 64 KiB before, such that the
  // pieces of any text that begins with `text` are those of its first n bytes and those of the
  // rest; or 0.
  size_t stable_prefix(std::string_view text, size_t below) const;

 private:
  bool digits_;
};

struct PatternPiece {
  size_t begin, end;
  bool matched;  // by the pattern; else what lies between two matches
};

// Any pattern, by PCRE2 (compiled just in time where the machine allows it).
class PatternSplitter {
 public:
  // \p{L}, \p{N}, \s and \S are replaced by this library's own classes, so that the Unicode version
  // of the PCRE2 at hand does not matter. Throws Error for a pattern that PCRE2 refuses.
  explicit PatternSplitter(const SplitRule& rule);
  ~PatternSplitter();
  // Appends the end of each piece to `ends`. Throws Error when a limit of PCRE2 is hit.
  void split(std::string_view text, std::vector<size_t>& ends) const;
  // The same pieces, and which of them the pattern matched; an empty match is a piece here.
  void find(std::string_view text, std::vector<PatternPiece>& pieces) const;

 private:
  class Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace natslm::data
