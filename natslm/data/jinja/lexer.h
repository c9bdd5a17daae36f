// A Jinja template as tokens. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace natslm::data::jinja {

struct Token {
  enum class Kind {
    kText,
    kBlockBegin,
    kBlockEnd,
    kPrintBegin,
    kPrintEnd,
    kName,
    kString,
    kInteger,
    kReal,
    kOperator,
    kEnd
  };
  Kind kind;
  std::string text;  // of a string: what it stands for
  int line;
};

// The last token is kEnd. Throws Error with the line.
std::vector<Token> tokens_of(std::string_view source);

}  // namespace natslm::data::jinja
