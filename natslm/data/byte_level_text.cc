// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cstdint>

#include "natslm/base/error.h"
#include "natslm/data/tokenizer_json.h"
#include "natslm/data/unicode_classes.h"

namespace natslm::data {
namespace {

struct Alphabet {
  std::array<uint16_t, 256> character{};  // of a byte
  std::array<int16_t, 0x144> byte{};      // of a character; -1: none
};

constexpr Alphabet kAlphabet = [] {
  Alphabet alphabet;
  for (int16_t& byte : alphabet.byte) byte = -1;
  uint16_t spare = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    alphabet.character[byte] = printable ? static_cast<uint16_t>(byte) : spare++;
    alphabet.byte[alphabet.character[byte]] = static_cast<int16_t>(byte);
  }
  return alphabet;
}();

}  // namespace

std::string byte_level_text(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) {
    const uint16_t character = kAlphabet.character[static_cast<unsigned char>(c)];
    if (character < 0x80) {
      text += static_cast<char>(character);
    } else {
      text += static_cast<char>(0xC0 | character >> 6);
      text += static_cast<char>(0x80 | (character & 0x3F));
    }
  }
  return text;
}

std::string byte_level_bytes(std::string_view text) {
  std::string bytes;
  for (size_t at = 0; at < text.size();) {
    const uint32_t length = char_at(text, at).bytes;
    // All characters of the alphabet have one or two bytes in UTF-8.
    const auto first = static_cast<unsigned char>(text[at]);
    const uint32_t character =
        length == 1 && first < 0x80 ? first
        : length == 2 ? (first & 0x1Fu) << 6 | (static_cast<unsigned char>(text[at + 1]) & 0x3Fu)
                      : 0xFFFFu;
    const int byte = character < kAlphabet.byte.size() ? kAlphabet.byte[character] : -1;
    NATSLM_CHECK(byte >= 0, "the token \"", text,
                 "\" is not in byte-level form: the character at byte ", at, " stands for no byte");
    bytes += static_cast<char>(byte);
    at += length;
  }
  return bytes;
}

std::string byte_level_alphabet() {
  std::string bytes;
  for (const int16_t byte : kAlphabet.byte) {
    if (byte >= 0) bytes += static_cast<char>(byte);
  }
  return bytes;
}

}  // namespace natslm::data
