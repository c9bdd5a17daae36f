// Unicode beyond the classes of unicode_classes.h: what normalisers and the rarer pre-tokenizers of
// tokenizer.json ask for. Where the answer depends on Unicode's version it is that of Hugging
// Face's `tokenizers` 0.23, measured there. Bytes that are not UTF-8 pass through everything
// unchanged. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "natslm/data/unicode_classes.h"

namespace natslm::data {

struct CodePoint {
  uint32_t value;  // kNoCharacter for a byte that is not (the beginning of) a character
  uint32_t bytes;
  CharClass kind;
};
inline constexpr uint32_t kNoCharacter = 0xffffffffu;

CodePoint code_point_at(std::string_view text, size_t at);  // at < text.size()
void append_utf8(uint32_t code_point, std::string& text);

// Calls use(CodePoint, its bytes in the text) for each character and each invalid byte.
template <class Use>
void for_each_character(std::string_view text, Use&& use) {
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    use(c, text.substr(at, c.bytes));
    at += c.bytes;
  }
}

bool is_punctuation(uint32_t code_point);      // ASCII punctuation and category P
bool is_mark(uint32_t code_point);             // category M
bool is_word(const CodePoint& c);              // \w of a regular expression
bool is_nonspacing_mark(uint32_t code_point);  // category Mn of Unicode 8, as Bert has it
bool is_control(uint32_t code_point);          // category C, unassigned ones apart
// More than one code point for U+0130 only, whose dot above comes after it.
void append_lower(uint32_t code_point, std::string& text);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };
std::string normalised(std::string_view text, NormalForm form);

// Length of the first extended grapheme cluster (Unicode Standard Annex 29); not of empty text.
size_t first_grapheme(std::string_view text);

}  // namespace natslm::data
