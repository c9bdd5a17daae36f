// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/charsmap.h"

#include "natslm/base/error.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data {
namespace {

// A unit of the trie (Darts-clone): its label in the lowest byte (bit 31 marks a value), whether a
// value follows in bit 8, the distance to its children above, in units of 1 or, with bit 9, of 256.
uint32_t label(uint32_t unit) {
  return unit & (1u << 31 | 0xFF);
}
bool has_value(uint32_t unit) {
  return unit >> 8 & 1;
}
uint32_t value(uint32_t unit) {
  return unit & ~(1u << 31);
}
uint32_t offset(uint32_t unit) {
  return unit >> 10 << ((unit & 1u << 9) >> 6);
}

uint32_t word_at(std::string_view bytes, size_t at) {
  uint32_t word = 0;
  for (size_t i = 0; i < 4; ++i) {
    word |= uint32_t{static_cast<unsigned char>(bytes[at + i])} << 8 * i;
  }
  return word;
}

}  // namespace

Charsmap::Charsmap(std::string_view bytes) {
  NATSLM_CHECK(bytes.size() >= 4, "the table of replacements has ", bytes.size(), " bytes");
  const size_t size = word_at(bytes, 0);
  NATSLM_CHECK(size % 4 == 0 && size > 0 && size <= bytes.size() - 4,
               "the table of replacements says that its trie has ", size, " bytes, of ",
               bytes.size() - 4);
  for (size_t at = 4; at < 4 + size; at += 4) trie_.push_back(word_at(bytes, at));
  strings_ = bytes.substr(4 + size);
  for_each_character(strings_, [&](const CodePoint& c, std::string_view) {
    NATSLM_CHECK(c.value != kNoCharacter, "the table of replacements is not UTF-8; damaged?");
  });
}

bool Charsmap::append_replacement(std::string_view part, std::string& result) const {
  size_t node = offset(trie_[0]);
  for (const char c : part) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte == 0) return false;
    node ^= byte;
    if (node >= trie_.size() || label(trie_[node]) != byte) return false;
    const uint32_t unit = trie_[node];
    node ^= offset(unit);
    if (has_value(unit)) {
      if (node >= trie_.size()) return false;
      const size_t at = value(trie_[node]);
      if (at > strings_.size()) return false;
      const size_t end = std::min(strings_.find('\0', at), strings_.size());
      result.append(strings_, at, end - at);
      return true;
    }
  }
  return false;
}

void Charsmap::apply(std::string& text) const {
  constexpr size_t kWhole = 6;
  std::string result;
  result.reserve(text.size());
  for (std::string_view rest = text; !rest.empty();) {
    const size_t size = first_grapheme(rest);
    const std::string_view grapheme = rest.substr(0, size);
    rest.remove_prefix(size);
    if (size < kWhole && append_replacement(grapheme, result)) continue;
    for_each_character(grapheme, [&](const CodePoint&, std::string_view bytes) {
      if (!append_replacement(bytes, result)) result += bytes;
    });
  }
  text = std::move(result);
}

std::string base64_bytes(std::string_view text) {
  std::string bytes;
  uint32_t bits = 0, count = 0;
  while (text.ends_with('=')) text.remove_suffix(1);
  for (const char c : text) {
    const int digit = c >= 'A' && c <= 'Z'   ? c - 'A'
                      : c >= 'a' && c <= 'z' ? c - 'a' + 26
                      : c >= '0' && c <= '9' ? c - '0' + 52
                      : c == '+'             ? 62
                      : c == '/'             ? 63
                                             : -1;
    NATSLM_CHECK(digit >= 0, "not base64: a character that is none of its 64");
    bits = bits << 6 | static_cast<uint32_t>(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes += static_cast<char>(bits >> count & 0xFF);
    }
  }
  return bytes;
}

}  // namespace natslm::data
