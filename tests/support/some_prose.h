// Text made of a few sentences, in an order that looks random and is the same each time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>

#include "natslm/base/counter_rng.h"

namespace natslm::test {

inline constexpr std::string_view kSentences[] = {
    "The grey sea was calm that day.",
    "Nobody had expected the ship so early!",
    "Was it the wind, or a voice?",
    "He folded the map and went on without a word.",
    "At noon they rested.",
};

inline std::string some_prose(size_t bytes) {
  std::string text;
  for (uint64_t i = 0; text.size() < bytes; ++i) {
    text += kSentences[mix64(i) % std::size(kSentences)];
    text += mix64(i) >> 32 & 3 ? " " : "\n\n";
  }
  return text;
}

}  // namespace natslm::test
