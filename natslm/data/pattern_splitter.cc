// SPDX-License-Identifier: Apache-2.0
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdio>

#include "natslm/base/error.h"
#include "natslm/data/split_rule.h"
#include "natslm/data/unicode_classes.h"

namespace natslm::data {
namespace {

// The inside of a bracketed class that matches the code points of one kind, or all others.
std::string class_body(CharClass kind, bool negated) {
  std::string body;
  const auto add = [&](uint32_t first, uint32_t last) {
    // PCRE2 refuses surrogates as the end of a range; no text holds them.
    if (first >= 0xD800 && first < 0xE000) first = 0xE000;
    if (last >= 0xD800 && last < 0xE000) last = 0xD7FF;
    if (first > last) return;
    char range[40];
    std::snprintf(range, sizeof range, "\\x{%X}-\\x{%X}", first, last);
    body += range;
  };
  uint32_t next = 0;
  for (const ClassRange& range : class_ranges()) {
    if (range.kind != kind) continue;
    if (!negated) {
      add(range.first, range.last);
    } else if (range.first > next) {
      add(next, range.first - 1);
    }
    next = range.last + 1;
  }
  if (negated) add(next, 0x10FFFF);
  return body;
}

// The pattern with \p{L}, \p{N}, \s and their negations spelled out.
std::string with_own_classes(std::string_view pattern) {
  struct Name {
    std::string_view text;
    CharClass kind;
    bool negated;
  };
  constexpr Name kNames[] = {
      {"\\p{L}", CharClass::kLetter, false}, {"\\P{L}", CharClass::kLetter, true},
      {"\\p{N}", CharClass::kNumber, false}, {"\\P{N}", CharClass::kNumber, true},
      {"\\s", CharClass::kSpace, false},     {"\\S", CharClass::kSpace, true}};
  std::string result;
  bool in_class = false;
  for (size_t at = 0; at < pattern.size();) {
    const Name* found = nullptr;
    for (const Name& name : kNames) {
      if (pattern.substr(at).starts_with(name.text)) found = &name;
    }
    if (found) {
      const std::string body = class_body(found->kind, found->negated);
      result += in_class ? body : "[" + body + "]";
      at += found->text.size();
    } else if (pattern[at] == '\\') {
      result += pattern.substr(at, 2);
      at += 2;
    } else {
      if (pattern[at] == '[') in_class = true;
      if (pattern[at] == ']') in_class = false;
      result += pattern[at++];
    }
  }
  return result;
}

std::string message_of(int error) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(error, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

class PatternSplitter::Impl {
 public:
  explicit Impl(const SplitRule& rule) : digits_(rule.digits) {
    const std::string pattern = with_own_classes(rule.pattern);
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    NATSLM_CHECK(code_, "the split pattern ", rule.pattern,
                 " is refused by PCRE2: ", message_of(error));
    // Not available everywhere (a kernel may forbid executable memory): then PCRE2 interprets.
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
  }

  // Calls piece(begin, end, whether the pattern matched there) for all pieces in the text's order,
  // empty matches included.
  template <class Piece>
  void pieces(std::string_view text, Piece&& piece) const {
    const Match match(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    NATSLM_CHECK(match, "out of memory for the split pattern");
    // Stretches of characters between runs of invalid bytes and, with digits_, between digits.
    size_t begin = 0, at = 0;
    const auto finish = [&](size_t end) {
      if (end > begin) stretch(text.substr(begin, end - begin), begin, *match, piece);
    };
    while (at < text.size()) {
      const Char found = char_at(text, at);
      if (found.kind == CharClass::kInvalid) {
        finish(at);
        begin = at;
        while (at < text.size() && char_at(text, at).kind == CharClass::kInvalid) ++at;
        piece(begin, at, false);
        begin = at;
      } else if (digits_ &&
                 (found.kind == CharClass::kNumber || found.kind == CharClass::kNewNumber)) {
        finish(at);
        piece(at, at + found.bytes, false);
        begin = at += found.bytes;
      } else {
        at += found.bytes;
      }
    }
    finish(at);
  }

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
  };
  using Match = std::unique_ptr<pcre2_match_data, Free>;

  // An empty match is one where the pattern has no longer one; the next search begins a character
  // later, so that none is found right after another match.
  template <class Piece>
  void stretch(std::string_view text, size_t offset, pcre2_match_data& match, Piece&& piece) const {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    size_t done = 0, last_match = std::string_view::npos;
    for (size_t at = 0; at <= text.size();) {
      const int count =
          pcre2_match(code_.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, &match, nullptr);
      if (count == PCRE2_ERROR_NOMATCH) break;
      NATSLM_CHECK(count >= 0, "splitting text by its pattern failed: ", message_of(count));
      const PCRE2_SIZE* found = pcre2_get_ovector_pointer(&match);
      const size_t begin = found[0], end = found[1];
      if (begin == end && end == last_match) {
        at += at < text.size() ? char_at(text, at).bytes : 1;
        continue;
      }
      NATSLM_CHECK(begin >= done && end >= begin, "the split pattern matches text twice");  // \K
      if (begin > done) piece(offset + done, offset + begin, false);
      piece(offset + begin, offset + end, true);
      done = at = last_match = end;
    }
    if (done < text.size()) piece(offset + done, offset + text.size(), false);
  }

  bool digits_;
  std::unique_ptr<pcre2_code, Free> code_;
};

PatternSplitter::PatternSplitter(const SplitRule& rule) : impl_(std::make_unique<Impl>(rule)) {}
PatternSplitter::~PatternSplitter() = default;
void PatternSplitter::split(std::string_view text, std::vector<size_t>& ends) const {
  impl_->pieces(text, [&](size_t begin, size_t end, bool) {
    if (begin < end) ends.push_back(end);
  });
}
void PatternSplitter::find(std::string_view text, std::vector<PatternPiece>& pieces) const {
  impl_->pieces(text, [&](size_t begin, size_t end, bool matched) {
    pieces.push_back({begin, end, matched});
  });
}

}  // namespace natslm::data
