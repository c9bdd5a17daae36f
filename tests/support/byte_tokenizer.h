// A tokenizer whose tokens are bytes: what a test expects can be read as text.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/tokenizer.h"

namespace natslm::test {

class ByteTokenizer final : public data::Tokenizer {
 public:
  int32_t vocabulary() const override { return 256; }
  void encode_to(std::string_view text, std::vector<int32_t>& ids) const override {
    for (const char c : text) ids.push_back(static_cast<uint8_t>(c));
  }
  std::string decode(const std::vector<int32_t>& ids) const override {
    return std::string(ids.begin(), ids.end());
  }
  std::string token_bytes(int32_t id) const override {
    return std::string(1, static_cast<char>(id));
  }
  size_t stable_prefix(std::string_view text) const override { return text.size(); }
  uint64_t fingerprint() const override { return 77; }
  void save(const std::filesystem::path&) const override {}
};

}  // namespace natslm::test
