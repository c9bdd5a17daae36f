// The pattern, alternative by alternative (the first that matches wins, every run is as long as
// possible):
//   's 't 're 've 'm 'll 'd | ?L+ | ?N+ | ?O+ | \s+ not followed by non-space | \s+
// where O is what is neither L, N nor white space. The last two give: white space before something
// else leaves its last character to what follows; which takes it if it is a plain space.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "natslm/data/split_rule.h"
#include "natslm/data/unicode_classes.h"

namespace natslm::data {
namespace {

constexpr std::array<CharClass, 128> kAscii = [] {
  std::array<CharClass, 128> kinds{};
  for (int c = 0; c < 128; ++c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    kinds[c] = letter                 ? CharClass::kLetter
               : c >= '0' && c <= '9' ? CharClass::kNumber
               : space                ? CharClass::kSpace
                                      : CharClass::kOther;
  }
  return kinds;
}();

class Scanner {
 public:
  Scanner(std::string_view text, bool digits) : text_(text), digits_(digits) {}

  // End of the piece that begins at `at`; at < size.
  size_t piece(size_t at) const {
    const Char first = next(at);
    switch (first.kind) {
      case CharClass::kInvalid:
        return run(at + 1, CharClass::kInvalid);
      case CharClass::kSpace:
        return white_space(at, first);
      case CharClass::kNumber:
        return digits_ ? at + first.bytes : run(at + first.bytes, first.kind);
      case CharClass::kNewNumber:  // only with digits_
        return at + first.bytes;
      case CharClass::kOther:
        if (text_[at] == '\'') {
          if (const size_t end = contraction(at)) return end;
        }
        [[fallthrough]];
      case CharClass::kLetter:
        return run(at + first.bytes, first.kind);
    }
    return at + 1;
  }

 private:
  Char next(size_t at) const {
    const auto byte = static_cast<unsigned char>(text_[at]);
    if (byte < 0x80) return {kAscii[byte], 1};
    Char found = char_at(text_, at);
    if (found.kind == CharClass::kNewNumber && !digits_) found.kind = CharClass::kOther;
    return found;
  }

  size_t run(size_t at, CharClass kind) const {
    while (at < text_.size()) {
      const Char found = next(at);
      if (found.kind != kind) break;
      at += found.bytes;
    }
    return at;
  }

  size_t contraction(size_t at) const {
    const size_t left = text_.size() - at;
    if (left < 2) return 0;
    const char a = text_[at + 1];
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
    if (left < 3) return 0;
    const char b = text_[at + 2];
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? at + 3 : 0;
  }

  // What ends the text for the pattern: its end, bytes that are no character, and digits cut out
  // before.
  bool barrier(CharClass kind) const {
    return kind == CharClass::kInvalid ||
           (digits_ && (kind == CharClass::kNumber || kind == CharClass::kNewNumber));
  }

  size_t white_space(size_t at, Char first) const {
    size_t last = at, end = at + first.bytes;  // where the run's last character begins and ends
    while (end < text_.size()) {
      const Char found = next(end);
      if (found.kind == CharClass::kSpace) {
        last = end;
        end += found.bytes;
        continue;
      }
      if (barrier(found.kind)) return end;
      if (last > at) return last;
      return text_[at] == ' ' ? run(end + found.bytes, found.kind) : end;
    }
    return end;
  }

  std::string_view text_;
  bool digits_;
};

constexpr bool is_word(CharClass kind) {
  return kind == CharClass::kLetter || kind == CharClass::kNumber;
}

}  // namespace

size_t Gpt2Splitter::split(std::string_view text, size_t from, size_t* ends, size_t room) const {
  const Scanner scanner(text, digits_);
  size_t count = 0;
  for (size_t at = from; at < text.size() && count < room; ++count) {
    at = scanner.piece(at);
    ends[count] = at;
  }
  return count;
}

size_t Gpt2Splitter::stable_prefix(std::string_view text, size_t below) const {
  // A piece ends wherever white space begins after something else, and where letters or digits end:
  // whatever follows, and whatever came before. Not where other characters end: "'" and "s" may be
  // one piece.
  constexpr size_t kLookBack = 1 << 16;
  below = std::min(below, text.size());
  const size_t lowest = below > kLookBack ? below - kLookBack : 0;
  for (size_t at = below; at-- > lowest + 1;) {
    const Char after = char_at(text, at), before = char_before(text, at);
    if (after.kind == CharClass::kInvalid || before.kind == CharClass::kInvalid ||
        before.kind == CharClass::kSpace || before.kind == after.kind) {
      continue;
    }
    if (after.kind == CharClass::kSpace || is_word(before.kind)) return at;
  }
  return 0;
}

}  // namespace natslm::data
