// SPDX-License-Identifier: Apache-2.0
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdio>

#include "natslm/base/error.h"
#include "natslm/data/split_rule.h"
#include "natslm/data/unicode_text.h"

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

// The same for \w. Oniguruma, which `tokenizers` uses, counts the numbers of Latin-1 too, and not
// the joiners that other engines count.
bool in_pattern_word(uint32_t c) {
  if (c == 0x200C || c == 0x200D) return false;
  return is_word({c, 1, class_of(c)}) || (c < 0x100 && class_of(c) == CharClass::kNumber);
}

std::string word_body(bool negated) {
  std::string body;
  for (uint32_t c = 0, first = 0; c <= 0x110000; ++c) {
    const bool surrogate = c >= 0xD800 && c < 0xE000;
    const bool in = c < 0x110000 && !surrogate && in_pattern_word(c) != negated;
    if (!in && first < c) {
      char range[40];
      std::snprintf(range, sizeof range, "\\x{%X}-\\x{%X}", first, c - 1);
      body += range;
    }
    if (!in) first = c + 1;
  }
  return body;
}

// clang-format off
// Categories as PCRE2's Unicode tables have them (version 14 in Debian 12's), and the characters of
// Unicode 15 and 16, which `tokenizers` counts too.
struct Category {
  std::string_view name, late;
};
constexpr Category kCategories[] = {
    {"\\d",
     R"(\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59})"
     R"(\x{16130}-\x{16139}\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1E4F0}-\x{1E4F9})"
     R"(\x{1E5F1}-\x{1E5FA})"},
    {"\\p{P}",
     R"(\x{1B4E}-\x{1B4F}\x{1B7F}\x{10D6E}\x{113D4}-\x{113D5}\x{113D7}-\x{113D8})"
     R"(\x{11B00}-\x{11B09}\x{11BE1}\x{11F43}-\x{11F4F}\x{16D6D}-\x{16D6F}\x{1E5FF})"},
    {"\\p{S}",
     R"(\x{2427}-\x{2429}\x{2FFC}-\x{2FFF}\x{31E4}-\x{31E5}\x{31EF}\x{10D8E}-\x{10D8F})"
     R"(\x{1CC00}-\x{1CCEF}\x{1CD00}-\x{1CEB3}\x{1F6DC}\x{1F774}-\x{1F776})"
     R"(\x{1F77B}-\x{1F77F}\x{1F7D9}\x{1F8B2}-\x{1F8BB}\x{1F8C0}-\x{1F8C1})"
     R"(\x{1FA75}-\x{1FA77}\x{1FA87}-\x{1FA89}\x{1FA8F}\x{1FAAD}-\x{1FAAF})"
     R"(\x{1FABB}-\x{1FABF}\x{1FAC6}\x{1FACE}-\x{1FACF}\x{1FADA}-\x{1FADC}\x{1FADF})"
     R"(\x{1FAE8}-\x{1FAE9}\x{1FAF7}-\x{1FAF8}\x{1FBCB}-\x{1FBEF})"},
    {"\\p{M}",
     R"(\x{897}\x{CF3}\x{ECE}\x{10D69}-\x{10D6D}\x{10EFC}-\x{10EFF}\x{11241})"
     R"(\x{113B8}-\x{113C0}\x{113C2}\x{113C5}\x{113C7}-\x{113CA}\x{113CC}-\x{113D0}\x{113D2})"
     R"(\x{113E1}-\x{113E2}\x{11F00}-\x{11F01}\x{11F03}\x{11F34}-\x{11F3A})"
     R"(\x{11F3E}-\x{11F42}\x{11F5A}\x{13440}\x{13447}-\x{13455}\x{1611E}-\x{1612F}\x{1E08F})"
     R"(\x{1E4EC}-\x{1E4EF}\x{1E5EE}-\x{1E5EF})"},
    {"\\p{Lu}",
     R"(\x{1C89}\x{A7CB}-\x{A7CC}\x{A7DA}\x{A7DC}\x{10D50}-\x{10D65})"},
    {"\\p{Ll}",
     R"(\x{1C8A}\x{A7CD}\x{A7DB}\x{10D70}-\x{10D85}\x{1DF25}-\x{1DF2A})"},
    {"\\p{Lm}",
     R"(\x{10D4E}\x{10D6F}\x{16D40}-\x{16D42}\x{16D6B}-\x{16D6C}\x{1E030}-\x{1E06D}\x{1E4EB})"},
    {"\\p{Lo}",
     R"(\x{105C0}-\x{105F3}\x{10D4A}-\x{10D4D}\x{10D4F}\x{10EC2}-\x{10EC4})"
     R"(\x{1123F}-\x{11240}\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}\x{113B7})"
     R"(\x{113D1}\x{113D3}\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10}\x{11F12}-\x{11F33})"
     R"(\x{1342F}\x{13441}-\x{13446}\x{13460}-\x{143FA}\x{16100}-\x{1611D})"
     R"(\x{16D43}-\x{16D6A}\x{18CFF}\x{1B132}\x{1B155}\x{1E4D0}-\x{1E4EA}\x{1E5D0}-\x{1E5ED})"
     R"(\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})"},
};
// clang-format on

// The pattern with \p{L}, \p{N}, \s and their negations spelled out, other categories completed.
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
    const auto category = std::ranges::find_if(
        kCategories, [&](const Category& one) { return pattern.substr(at).starts_with(one.name); });
    if (pattern.substr(at).starts_with("\\w") || pattern.substr(at).starts_with("\\W")) {
      const std::string body = word_body(pattern[at + 1] == 'W');
      result += in_class ? body : "[" + body + "]";
      at += 2;
    } else if (category != std::end(kCategories)) {
      const std::string body = std::string(category->name) + std::string(category->late);
      result += in_class ? body : "[" + body + "]";
      at += category->name.size();
    } else if (found) {
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
    // ^ and $ are those of lines, as in Oniguruma, which `tokenizers` uses.
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, nullptr));
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
