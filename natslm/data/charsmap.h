// SentencePiece's table of replacements (NormalizerSpec.precompiled_charsmap), which tokenizer.json
// carries as the normalizer Precompiled: a double-array trie from strings to strings.
// Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace natslm::data {

class Charsmap {
 public:
  // bytes: length of the trie in bytes (little endian, 32 bits), the trie, strings that end in 0.
  // Throws Error when the lengths do not fit or a string is not UTF-8.
  explicit Charsmap(std::string_view bytes);
  // Grapheme by grapheme, as `tokenizers` does it: one of less than 6 bytes as a whole, else
  // character by character.
  void apply(std::string& text) const;

 private:
  // Appends what stands for the shortest known beginning of `part`; false: there is none.
  bool append_replacement(std::string_view part, std::string& result) const;

  std::vector<uint32_t> trie_;
  std::string strings_;
};

std::string base64_bytes(std::string_view text);  // throws Error

}  // namespace natslm::data
