// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/text_stream.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace natslm::engine {
namespace {

// Length of the character that begins with this byte; 1 for a byte that begins none.
size_t character_length(uint8_t lead) {
  if (lead >= 0xC2 && lead <= 0xDF) return 2;
  if (lead >= 0xE0 && lead <= 0xEF) return 3;
  if (lead >= 0xF0 && lead <= 0xF4) return 4;
  return 1;
}

// Whether `byte` may be byte number `index` (1, 2, 3) of a character that begins with `lead`:
// over-long forms, surrogates and code points above U+10FFFF are ruled out by the second byte
// (Unicode, table 3-7).
bool continues(uint8_t lead, size_t index, uint8_t byte) {
  uint8_t low = 0x80, high = 0xBF;
  if (index == 1) {
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  }
  return byte >= low && byte <= high;
}

}  // namespace

size_t whole_characters(std::string_view text) {
  // Only the last three bytes can begin a character that is not complete yet.
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const size_t start = text.size() - back;
    const uint8_t lead = text[start];
    if ((lead & 0xC0) == 0x80) continue;
    if (character_length(lead) <= back) return text.size();
    for (size_t index = 1; index < back; ++index) {
      if (!continues(lead, index, text[start + index])) return text.size();
    }
    return start;
  }
  return text.size();
}

TextStream::TextStream(std::vector<std::string> stop) : stop_(std::move(stop)) {
  std::erase(stop_, "");
}

std::string TextStream::push(std::string_view bytes) {
  if (stopped_) return "";
  held_ += bytes;
  size_t first = std::string::npos;
  for (const std::string& stop : stop_) first = std::min(first, held_.find(stop));
  if (first != std::string::npos) {
    stopped_ = true;
    return std::exchange(held_, "").substr(0, first);
  }
  size_t ready = whole_characters(held_);
  for (const std::string& stop : stop_) {
    // The longest end of the text that a stop string could go on from.
    for (size_t length = std::min(stop.size() - 1, held_.size()); length > 0; --length) {
      if (held_.ends_with(std::string_view(stop).substr(0, length))) {
        ready = std::min(ready, held_.size() - length);
        break;
      }
    }
  }
  std::string piece = held_.substr(0, ready);
  held_.erase(0, ready);
  return piece;
}

std::string TextStream::finish() {
  return std::exchange(held_, "");
}

}  // namespace natslm::engine
