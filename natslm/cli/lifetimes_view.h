// Draws a text so that lifetimes are seen: each token in the colour of its role, highlighted if its
// key is still in the cache at the end, faint if it was evicted; under it, a bar for every layer
// and KV head. Terminals of 256 and of 16 colours, and plain marks without colour.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace natslm::cli {

enum class Palette : uint8_t { kPlain, k16, k256 };

// Of standard output: plain unless colour is welcome, then what TERM and COLORTERM say.
Palette palette_of(bool colour);

// One (layer, KV head): an entry a token.
struct HeadLifetimes {
  std::vector<int8_t>
      role;  // roles::Role, or -1 where there is none; empty: the policy gives no roles
  std::vector<uint8_t> alive;  // 1: the key is in the cache at the end
};

struct LifetimesPicture {
  std::vector<std::string> tokens;                // their bytes
  std::vector<std::vector<HeadLifetimes>> heads;  // [layer][KV head]
};

struct ViewOptions {
  Palette palette = Palette::kPlain;
  int32_t width = 80;  // columns of the terminal
  int32_t layer = -1;  // which (layer, head) the text shows; -1: all of them together
  int32_t head = -1;
  int32_t max_lines = 48;  // of text: the middle of a longer one is left out
};

// The picture, lines ended by newlines. With all heads together a token's colour is its most
// frequent role among the heads that still hold it (among all, if none does), and it is the
// stronger the more heads do.
std::string draw_lifetimes(const LifetimesPicture& picture, const ViewOptions& options);

// Columns that a terminal gives to a character: 0, 1 or 2.
int32_t columns_of(char32_t character);

// Text that is safe to print on a terminal: control characters but newline and tab, and bytes that
// are no UTF-8, become U+FFFD.
std::string printable(std::string_view text);

}  // namespace natslm::cli
