// Byte-level byte-pair encoding (Radford et al., "Language models are unsupervised multitask
// learners", 2019; Sennrich et al. 2016): cut the text into pieces, start from the piece's bytes,
// and join the adjacent pair that stands earliest in the list of merges (the leftmost one of
// equals) until none is left. Gives the ids of Hugging Face's `tokenizers` for every valid text.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "natslm/data/added_tokens.h"
#include "natslm/data/split_rule.h"
#include "natslm/data/tokenizer.h"

namespace natslm::data {

// All that defines such a tokenizer, and no more.
struct BpeModel {
  std::vector<std::string> tokens;                  // bytes of each id; empty: the id is unused
  std::vector<std::pair<int32_t, int32_t>> merges;  // ids of left and right, earliest first
  std::vector<AddedToken> added;                    // their ids have their contents in `tokens`
  SplitRule split;
  bool whole_pieces_first = false;  // a piece that is a token is not cut (`ignore_merges`)
};

inline constexpr std::string_view kEndOfText = "<|endoftext|>";

class ByteLevelBpe : public Tokenizer {
 public:
  // Throws Error for a model that cannot work: two equal tokens, a merge whose result is no token,
  // a merge given twice, a merge of a token that nothing makes. A byte without a token is allowed
  // (some vocabularies lack a few): it is dropped by encode(), as `tokenizers` drops it.
  explicit ByteLevelBpe(BpeModel model);
  ~ByteLevelBpe() override;

  const BpeModel& model() const { return model_; }
  int32_t vocabulary() const override { return static_cast<int32_t>(model_.tokens.size()); }
  void encode_to(std::string_view text, std::vector<int32_t>& ids) const override;
  std::string decode(const std::vector<int32_t>& ids) const override;
  std::string token_bytes(int32_t id) const override;
  int32_t added_token(std::string_view content) const override;
  int32_t end_of_text() const override { return end_of_text_; }
  size_t stable_prefix(std::string_view text) const override;
  uint64_t fingerprint() const override { return fingerprint_; }
  void save(const std::filesystem::path& folder) const override;

 private:
  class Encoder;
  const std::string& checked_token(int32_t id) const;

  BpeModel model_;
  int32_t end_of_text_ = -1;
  uint64_t fingerprint_ = 0;
  std::unique_ptr<Encoder> encoder_;
};

}  // namespace natslm::data
