// GPT-2's pattern by hand and by PCRE2, to be compared.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <vector>

#include "natslm/data/split_rule.h"

namespace natslm::data {

// In portions of `room`, as the encoder asks for them.
inline std::vector<size_t> by_hand(std::string_view text, bool digits, size_t room = 256) {
  const Gpt2Splitter splitter(digits);
  std::vector<size_t> ends, portion(room);
  size_t at = 0;
  while (const size_t count = splitter.split(text, at, portion.data(), room)) {
    ends.insert(ends.end(), portion.begin(), portion.begin() + count);
    at = ends.back();
  }
  return ends;
}

inline const PatternSplitter& by_pcre2(bool digits) {
  static const PatternSplitter plain{SplitRule{}}, with_digits{SplitRule{.digits = true}};
  return digits ? with_digits : plain;
}

inline std::vector<size_t> by_pattern(std::string_view text, bool digits) {
  std::vector<size_t> ends;
  by_pcre2(digits).split(text, ends);
  return ends;
}

}  // namespace natslm::data
