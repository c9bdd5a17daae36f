// SPDX-License-Identifier: Apache-2.0
#include "tests/data/tokenizer_texts.h"

#include <stdlib.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <string_view>
#include <utility>

namespace natslm::data {

uint64_t Random::next() {
  state_ += 0x9E3779B97F4A7C15u;
  uint64_t x = state_;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

std::string utf8(uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

std::string block_text(uint32_t block) {
  std::string text;
  for (uint32_t c = block * kBlock; c < (block + 1) * kBlock; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string x = utf8(c);
    text += "a" + x + "1" + x + " " + x + "'s" + x + x + "  " + x + "\n";
  }
  return text;
}

std::string fuzz_text(uint64_t number) {
  constexpr std::pair<uint32_t, uint32_t> kRanges[] = {
      {0xA0, 0xFF},       {0x100, 0x17F},     {0x300, 0x36F},     {0x370, 0x3FF},
      {0x400, 0x4FF},     {0x590, 0x5FF},     {0x600, 0x6FF},     {0x900, 0x97F},
      {0xE00, 0xE7F},     {0x1100, 0x11FF},   {0x2000, 0x206F},   {0x2150, 0x218F},
      {0x2460, 0x24FF},   {0x3000, 0x30FF},   {0x4E00, 0x9FFF},   {0xAC00, 0xD7A3},
      {0xFE00, 0xFE0F},   {0xFF00, 0xFFEF},   {0x1D400, 0x1D7FF}, {0x1F1E6, 0x1F1FF},
      {0x1F300, 0x1F6FF}, {0x1F3FB, 0x1F3FF}, {0x20000, 0x2A6DF}, {0xE0100, 0xE01EF}};
  constexpr uint32_t kSpaces[] = {0x20, 0x20, 0x20, 0x09,   0x0A,   0x0A,   0x0D,  0x0B,
                                  0x0C, 0x85, 0xA0, 0x2003, 0x2028, 0x3000, 0x200D};
  constexpr std::string_view kFixed[] = {"'s",
                                         "'t",
                                         "'re",
                                         "'ve",
                                         "'m",
                                         "'ll",
                                         "'d",
                                         "'S",
                                         "'r",
                                         "'v",
                                         "'l",
                                         "''s",
                                         " 's",
                                         "<|endoftext|>",
                                         "<|endo",
                                         "<|endoftext|",
                                         "<|endoftext|><|endoftext|>",
                                         "<<|endoftext|>>"};
  constexpr std::string_view kLetters = "etaoinshrdlucmfwygpbvkxqjzETAOINS";
  constexpr std::string_view kPunctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
  Random random(number);
  std::string text;
  const auto times = [&](uint64_t most, auto&& add) {
    for (uint64_t left = 1 + random.below(most); left > 0; --left) add();
  };
  for (int part = 0; part < 200; ++part) {
    const uint64_t kind = random.below(100);
    if (kind < 30) {
      times(8, [&] { text += kLetters[random.below(kLetters.size())]; });
    } else if (kind < 50) {
      times(3, [&] { text += utf8(kSpaces[random.below(std::size(kSpaces))]); });
    } else if (kind < 57) {
      times(4, [&] { text += static_cast<char>('0' + random.below(10)); });
    } else if (kind < 67) {
      times(3, [&] { text += kPunctuation[random.below(kPunctuation.size())]; });
    } else if (kind < 73) {
      text += kFixed[random.below(std::size(kFixed))];
    } else if (kind < 93) {
      const auto [first, last] = kRanges[random.below(std::size(kRanges))];
      times(3,
            [&] { text += utf8(first + static_cast<uint32_t>(random.below(last - first + 1))); });
    } else if (kind < 95) {
      text += static_cast<char>(random.below(0x20));
    } else {
      const auto c = static_cast<uint32_t>(random.below(0x110000));
      text += c >= 0xD800 && c < 0xE000 ? "?" : utf8(c);
    }
  }
  return text;
}

std::string damaged_text(uint64_t number) {
  std::string text = fuzz_text(number);
  Random random(~number);
  for (int flips = 0; flips < 60; ++flips) {
    const size_t at = random.below(text.size());
    switch (random.below(3)) {
      case 0:
        text[at] = static_cast<char>(random.below(256));
        break;
      case 1:
        text.erase(at, 1);
        break;
      default:
        text.insert(at, 1, static_cast<char>(0x80 + random.below(128)));
    }
  }
  return text;
}

std::string hash_of(const std::vector<int32_t>& ids) {
  uint64_t value = 0xCBF29CE484222325u;
  for (const int32_t id : ids) {
    for (int shift = 0; shift < 32; shift += 8) {
      value = (value ^ (static_cast<uint32_t>(id) >> shift & 0xFF)) * 0x100000001B3u;
    }
  }
  char text[9];
  std::snprintf(text, sizeof text, "%08x", static_cast<uint32_t>(value));
  return text;
}

std::filesystem::path golden_folder() {
  return NATSLM_TEST_SOURCE "/tests/golden/tokenizer";
}
std::filesystem::path shared_data() {
  return NATSLM_TEST_SOURCE "/../shared/data";
}

void write_file(const std::filesystem::path& path, std::string_view contents) {
  std::filesystem::create_directories(path.parent_path());
  // A new file: some file systems flush one that is truncated and written again.
  std::filesystem::remove(path);
  std::ofstream(path, std::ios::binary) << contents;
}

}  // namespace natslm::data
