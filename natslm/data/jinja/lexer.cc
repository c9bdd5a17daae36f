// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/lexer.h"

#include <algorithm>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data::jinja {
namespace {

using Kind = Token::Kind;

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || is_digit(c) ||
         static_cast<unsigned char>(c) >= 0x80;
}

// \r\n and \r become \n, and one newline at the end goes.
std::string plain_newlines(std::string_view source) {
  std::string text;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      text += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      text += source[i];
    }
  }
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : text_(plain_newlines(source)) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      const size_t tag = next_tag();
      if (tag == std::string::npos) {
        add_text(text_.size());
        break;
      }
      const char kind = text_[tag + 1];
      const char sign = tag + 2 < text_.size() ? text_[tag + 2] : ' ';
      const bool signed_ = sign == '-' || sign == '+';
      add_text_before(tag, kind, sign);
      at_ = tag + 2 + signed_;
      if (kind == '#') {
        comment();
      } else if (kind == '{') {
        add(Kind::kPrintBegin, "{{");
        inside("}}", Kind::kPrintEnd);
      } else if (!raw()) {
        add(Kind::kBlockBegin, "{%");
        inside("%}", Kind::kBlockEnd);
      }
    }
    add(Kind::kEnd, "end of the template");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void error(std::string_view what) const { fail("line ", line_, ": ", what); }
  void add(Kind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  size_t next_tag() const {
    for (size_t at = at_; (at = text_.find('{', at)) != std::string::npos; ++at) {
      if (at + 1 < text_.size() &&
          std::string_view("{%#").find(text_[at + 1]) != std::string::npos) {
        return at;
      }
    }
    return std::string::npos;
  }

  // Moves to `end`, counting lines; what was passed decides whether a line begins there.
  void advance(size_t end) {
    line_ += static_cast<int>(std::count(text_.begin() + at_, text_.begin() + end, '\n'));
    if (end > at_) line_begins_ = text_[end - 1] == '\n';
    at_ = end;
  }

  void add_text(size_t end) {
    if (end > at_) add(Kind::kText, text_.substr(at_, end - at_));
    advance(end);
  }

  // The text up to a tag, less the white space that the tag takes away.
  void add_text_before(size_t tag, char kind, char sign) {
    size_t end = tag;
    if (sign == '-') {
      while (end > at_) {
        const Char c = char_before(text_, end);
        if (c.kind != CharClass::kSpace || end - at_ < c.bytes) break;
        end -= c.bytes;
      }
    } else if (sign != '+' && kind != '{') {
      const std::string_view before = std::string_view(text_).substr(at_, tag - at_);
      const size_t newline = before.rfind('\n');
      const size_t begin = newline == before.npos ? 0 : newline + 1;
      const bool whole_line = newline != before.npos || line_begins_;
      if (whole_line && before.find_first_not_of(" \t", begin) == before.npos) end = at_ + begin;
    }
    if (end > at_) add(Kind::kText, text_.substr(at_, end - at_));
    advance(tag);
  }

  void skip_space() {
    size_t end = at_;
    while (end < text_.size()) {
      const Char c = char_at(text_, end);
      if (c.kind != CharClass::kSpace) break;
      end += c.bytes;
    }
    advance(end);
  }

  // After the end of a tag, whose sign was `sign`.
  void after_tag(char sign, bool trims_newline) {
    line_begins_ = false;
    if (sign == '-') {
      skip_space();
    } else if (sign != '+' && trims_newline && at_ < text_.size() && text_[at_] == '\n') {
      advance(at_ + 1);
    }
  }

  void comment() {
    const size_t end = text_.find("#}", at_);
    if (end == std::string::npos) error("a comment does not end");
    const char sign = end > at_ ? text_[end - 1] : ' ';
    advance(end + 2);
    after_tag(sign, true);
  }

  // Text between {% raw %} and {% endraw %} is no code; true if this is such a block.
  bool raw() {
    size_t at = text_.find_first_not_of(" \t\n", at_);
    if (at == std::string::npos || text_.compare(at, 3, "raw") != 0) return false;
    at = text_.find_first_not_of(" \t\n", at + 3);
    if (at == std::string::npos) return false;
    const bool minus = text_.compare(at, 3, "-%}") == 0;
    if (!minus && text_.compare(at, 2, "%}") != 0) return false;
    advance(at + 2 + minus);
    after_tag(minus ? '-' : '+', false);
    for (size_t tag = at_; (tag = text_.find("{%", tag)) != std::string::npos; ++tag) {
      size_t word = tag + 2;
      const char sign = word < text_.size() ? text_[word] : ' ';
      if (sign == '-' || sign == '+') ++word;
      word = text_.find_first_not_of(" \t\n", word);
      if (word == std::string::npos || text_.compare(word, 6, "endraw") != 0) continue;
      size_t end = text_.find_first_not_of(" \t\n", word + 6);
      if (end == std::string::npos) break;
      const char end_sign = text_[end] == '-' || text_[end] == '+' ? text_[end++] : ' ';
      if (text_.compare(end, 2, "%}") != 0) continue;
      add_text_before(tag, '%', sign);
      advance(end + 2);
      after_tag(end_sign, true);
      return true;
    }
    error("a raw block does not end");
  }

  // The tokens of a tag up to its end; inside brackets nothing is an end.
  void inside(std::string_view end, Kind kind) {
    std::string open;
    for (;;) {
      skip_space();
      if (at_ >= text_.size()) error("a tag does not end");
      const std::string_view rest = std::string_view(text_).substr(at_);
      if (open.empty()) {
        const bool sign = (rest[0] == '-' || (rest[0] == '+' && kind == Kind::kBlockEnd)) &&
                          rest.substr(1).starts_with(end);
        if (sign || rest.starts_with(end)) {
          add(kind, std::string(end));
          const char which = sign ? rest[0] : ' ';
          advance(at_ + end.size() + sign);
          after_tag(which, kind == Kind::kBlockEnd);
          return;
        }
      }
      const char c = rest[0];
      if (c == '"' || c == '\'') {
        string(c);
      } else if (is_digit(c)) {
        number(rest);
      } else if (is_name(c)) {
        size_t size = 1;
        while (size < rest.size() && is_name(rest[size])) ++size;
        add(Kind::kName, std::string(rest.substr(0, size)));
        advance(at_ + size);
      } else {
        operation(rest, open);
      }
    }
  }

  void operation(std::string_view rest, std::string& open) {
    constexpr std::string_view kTwo[] = {"//", "**", "==", "!=", ">=", "<="};
    const bool two = std::ranges::find(kTwo, rest.substr(0, 2)) != std::end(kTwo);
    const char c = rest[0];
    if (!two && std::string_view("+-/*%~[](){}<>=.:|,;").find(c) == std::string_view::npos) {
      error("unexpected character '" + std::string(rest.substr(0, char_at(rest, 0).bytes)) + "'");
    }
    constexpr std::string_view kOpen = "([{", kClose = ")]}";
    if (!two && kOpen.find(c) != kOpen.npos) open += c;
    if (const size_t which = kClose.find(c); !two && which != kClose.npos) {
      if (open.empty() || open.back() != kOpen[which]) {
        error("unexpected '" + std::string(1, c) + "'");
      }
      open.pop_back();
    }
    add(Kind::kOperator, std::string(rest.substr(0, two ? 2 : 1)));
    advance(at_ + (two ? 2 : 1));
  }

  void number(std::string_view rest) {
    size_t size = 0;
    const auto digits = [&] {
      while (size < rest.size() && (is_digit(rest[size]) || rest[size] == '_')) ++size;
    };
    bool real = false;
    digits();
    if (size + 1 < rest.size() && rest[size] == '.' && is_digit(rest[size + 1])) {
      real = true;
      ++size;
      digits();
    }
    if (size + 1 < rest.size() && (rest[size] == 'e' || rest[size] == 'E')) {
      size_t after = size + 1;
      if (rest[after] == '+' || rest[after] == '-') ++after;
      if (after < rest.size() && is_digit(rest[after])) {
        real = true;
        size = after;
        digits();
      }
    }
    std::string text(rest.substr(0, size));
    std::erase(text, '_');
    add(real ? Kind::kReal : Kind::kInteger, text);
    advance(at_ + size);
  }

  void string(char quote) {
    std::string value;
    size_t at = at_ + 1;
    for (; at < text_.size() && text_[at] != quote; ++at) {
      if (text_[at] != '\\' || at + 1 == text_.size()) {
        value += text_[at];
      } else {
        at = escape(at + 1, value);
      }
    }
    if (at >= text_.size()) error("a string does not end");
    add(Kind::kString, value);
    advance(at + 1);
  }

  // Python's escapes; `at`: after the backslash. Returns the place of the last character it used.
  size_t escape(size_t at, std::string& value) const {
    constexpr std::string_view kNames = "abfnrtv0\\'\"", kValues("\a\b\f\n\r\t\v\0\\'\"", 11);
    const char c = text_[at];
    if (c == '\n') return at;  // a line that goes on
    if (c >= '0' && c <= '7') {
      uint32_t code = 0;
      size_t end = at;
      while (end < at + 3 && end < text_.size() && text_[end] >= '0' && text_[end] <= '7') {
        code = code * 8 + static_cast<uint32_t>(text_[end++] - '0');
      }
      append_utf8(code, value);
      return end - 1;
    }
    if (const size_t which = kNames.find(c); which != kNames.npos) {
      value += kValues[which];
      return at;
    }
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {
      (value += '\\') += c;
      return at;
    }
    uint32_t code = 0;
    for (size_t i = 1; i <= digits; ++i) {
      const char digit = at + i < text_.size() ? text_[at + i] : ' ';
      const size_t number =
          std::string_view("0123456789abcdef")
              .find(digit >= 'A' && digit <= 'F' ? static_cast<char>(digit + 32) : digit);
      if (number == std::string_view::npos) error("a string has a damaged escape");
      code = code << 4 | static_cast<uint32_t>(number);
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      error("a string has an escape that is no character");
    }
    append_utf8(code, value);
    return at + digits;
  }

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_begins_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokens_of(std::string_view source) {
  return Lexer(source).run();
}

}  // namespace natslm::data::jinja
