// The few Unicode facts that splitting text needs, and UTF-8 decoding. The classes are those of
// Unicode 16, which Hugging Face's `tokenizers` (0.23) splits by; tools/golden_tokenizer.py
// measures them there and prints the table of unicode_classes.cc. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace natslm::data {

enum class CharClass : uint8_t {
  kOther,
  kLetter,     // general category L
  kNumber,     // general category N
  kSpace,      // White_Space
  kNewNumber,  // N since Unicode 17: `tokenizers` cuts it out as a digit, its pattern takes it as
               // other
  kInvalid,    // not (the beginning of) a character in UTF-8
};

struct ClassRange {
  uint32_t first, last;
  CharClass kind;
};
// All code points that are not kOther, ascending.
std::span<const ClassRange> class_ranges();

CharClass class_of(uint32_t code_point);  // below 0x110000

struct Char {
  CharClass kind;
  uint32_t bytes;  // 1 for kInvalid
};
// The character that begins at text[at]; at < text.size(). Overlong forms, surrogates and values
// above U+10FFFF are invalid, as in RFC 3629.
Char char_at(std::string_view text, size_t at);
// The character that ends before text[at]; at > 0. kInvalid when there is none.
Char char_before(std::string_view text, size_t at);

}  // namespace natslm::data
