// A place in a template's tokens, and how deep what stands there is nested: what its parsers share.
// Internal to data/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/data/jinja/lexer.h"

namespace natslm::data::jinja {

class TokenCursor {
 public:
  // Throws Error with the line.
  explicit TokenCursor(std::string_view source) : tokens_(tokens_of(source)) {}

  // One level of nesting, for as long as it lives.
  class Level {
   public:
    explicit Level(TokenCursor& cursor) : cursor_(cursor) {
      if (++cursor_.depth_ > kDeepest) cursor_.error("nested too deeply");
    }
    ~Level() { --cursor_.depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    TokenCursor& cursor_;
  };

  const Token& now() const { return tokens_[at_]; }
  const Token& next() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  bool is(Token::Kind kind, std::string_view text) const {
    return now().kind == kind && now().text == text;
  }
  bool is_operator(std::string_view text) const { return is(Token::Kind::kOperator, text); }
  bool is_word(std::string_view text) const { return is(Token::Kind::kName, text); }

  // Steps over the present token, which is not the last.
  const Token& take() { return tokens_[at_++]; }
  // Steps over it if it is this one.
  bool take(Token::Kind kind, std::string_view text) {
    if (!is(kind, text)) return false;
    ++at_;
    return true;
  }
  bool take_operator(std::string_view text) { return take(Token::Kind::kOperator, text); }
  bool take_word(std::string_view text) { return take(Token::Kind::kName, text); }

  // Step over what has to be there; throw Error with the line.
  void expect_operator(std::string_view text) { expect(Token::Kind::kOperator, text); }
  void expect_word(std::string_view text) { expect(Token::Kind::kName, text); }
  void expect(Token::Kind kind) {
    if (now().kind != kind) unexpected(now());
    ++at_;
  }
  std::string name() {
    if (now().kind != Token::Kind::kName) unexpected(now());
    return take().text;
  }

  [[noreturn]] void error(const std::string& what) const { fail("line ", now().line, ": ", what); }
  [[noreturn]] static void unexpected(const Token& token) {
    fail("line ", token.line, ": unexpected \"", token.text, "\"");
  }

 private:
  // Expressions and blocks nested deeper are refused, so that evaluating them needs little stack.
  static constexpr int kDeepest = 64;

  void expect(Token::Kind kind, std::string_view text) {
    if (!take(kind, text)) {
      error("\"" + std::string(text) + "\" is needed before \"" + now().text + "\"");
    }
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace natslm::data::jinja
