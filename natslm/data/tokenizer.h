// Text <-> token ids. Encoding any byte string and decoding it again gives the same bytes, invalid UTF-8
// included.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace natslm::data {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual int32_t vocabulary() const = 0;  // ids are 0 .. vocabulary() - 1
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;
  // The bytes of the tokens one after the other; throws Error for an id outside the vocabulary.
  virtual std::string decode(const std::vector<int32_t>& ids) const = 0;
  // The bytes of one token (may be a part of a UTF-8 character).
  virtual std::string token_bytes(int32_t id) const = 0;
  // Id of the token that separates documents, or -1.
  virtual int32_t end_of_text() const { return -1; }
  // Writes tokenizer.json into `folder`.
  virtual void save(const std::filesystem::path& folder) const = 0;
};

// From a folder that holds tokenizer.json, or GPT-2's encoder.json + vocab.bpe, or vocab.json +
// merges.txt; or from a tokenizer.json file itself. Throws Error naming file and reason.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);

}  // namespace natslm::data
