// Text <-> token ids. All calls are const and may come from several threads at once.
// Byte-level tokenizers give any byte string back from its ids, invalid UTF-8 included; others may
// normalise the text or lack characters.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace natslm::data {

inline constexpr int64_t kMostTokens = int64_t{1} << 24;

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual int32_t vocabulary() const = 0;  // ids are 0 .. vocabulary() - 1
  // Appends the ids of `text` to `ids`, without before_text() and after_text(). The contents of
  // added tokens ("<|endoftext|>") are recognised in the text.
  virtual void encode_to(std::string_view text, std::vector<int32_t>& ids) const = 0;
  virtual std::vector<int32_t> encode(std::string_view text) const {
    std::vector<int32_t> ids;
    encode_to(text, ids);
    return ids;
  }
  // What the tokenizer puts around one whole text for its model (a token for its beginning, say);
  // empty for most. A chat template writes such tokens itself.
  virtual std::vector<int32_t> before_text() const { return {}; }
  virtual std::vector<int32_t> after_text() const { return {}; }
  // The bytes of the tokens one after the other, without what the tokenizer puts before the first
  // word of a text; throws Error for an id outside the vocabulary.
  virtual std::string decode(const std::vector<int32_t>& ids) const = 0;
  // The bytes of one token (may be a part of a UTF-8 character).
  virtual std::string token_bytes(int32_t id) const = 0;
  // Id of the added token with this content, or -1.
  virtual int32_t added_token(std::string_view) const { return -1; }
  // Id of the token that separates documents, or -1.
  virtual int32_t end_of_text() const { return -1; }
  // For text that comes in blocks: a length n such that, whatever follows `text`,
  // encode(all) = encode(first n bytes) + encode(the rest). The largest that is found quickly; 0 if
  // there is none.
  virtual size_t stable_prefix(std::string_view text) const = 0;
  // Equal for tokenizers that give the same ids for every text; packed files carry it.
  virtual uint64_t fingerprint() const = 0;
  // Writes tokenizer.json (Hugging Face's form) into `folder`, which must exist.
  virtual void save(const std::filesystem::path& folder) const = 0;
};

// From a folder that holds tokenizer.json, or SentencePiece's tokenizer.model, or GPT-2's
// encoder.json + vocab.bpe, or vocab.json + merges.txt; or from one such file: .json, .model, or
// .gguf (the vocabulary that a model file carries). Throws Error naming file and reason.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);

}  // namespace natslm::data
