// The member `model` of tokenizer.json for vocabularies of characters: BPE and Unigram. (Byte-level
// BPE without more has a faster way, PieceEncoder.) Internal to data/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "natslm/data/json_field.h"

namespace natslm::data {

class PieceModel {
 public:
  virtual ~PieceModel() = default;
  // Appends the ids of a piece; not empty. Throws Error for text that the vocabulary cannot
  // express, where the model has no token for it.
  virtual void encode(std::string_view piece, std::vector<int32_t>& ids) const = 0;
  // Text may also be cut in front of each run of this character (after another one), and gives the
  // same ids; empty: not known.
  virtual std::string cut_before() const { return ""; }

  const std::vector<std::string>& tokens() const { return tokens_; }  // empty: the id is unused
  int32_t id_of(std::string_view token) const;                        // -1: none

 protected:
  void add_token(std::string token, int32_t id);
  // The ids of "<0x00>" .. "<0xFF>", -1 where missing.
  std::vector<int32_t> byte_tokens() const;

  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> ids_;
};

// Throws Error naming the member that is wrong or not known.
std::unique_ptr<PieceModel> read_piece_model(const Field& field);

}  // namespace natslm::data
