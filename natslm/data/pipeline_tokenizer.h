// A tokenizer in the general form of Hugging Face's tokenizer.json: added tokens are found, the
// text between them is normalised and cut into pieces, a model turns pieces into ids, and tokens
// may be put around the whole. SentencePiece's and GGUF's vocabularies are brought into this form.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/added_tokens.h"
#include "natslm/data/json_field.h"
#include "natslm/data/tokenizer.h"

namespace natslm::data {

class PipelineTokenizer final : public Tokenizer {
 public:
  // json: the contents of a tokenizer.json. Throws Error naming the member that is wrong, or that
  // is not known and changes ids.
  explicit PipelineTokenizer(const Json& json);
  ~PipelineTokenizer() override;

  int32_t vocabulary() const override { return static_cast<int32_t>(tokens_.size()); }
  void encode_to(std::string_view text, std::vector<int32_t>& ids) const override;
  std::vector<int32_t> before_text() const override { return before_; }
  std::vector<int32_t> after_text() const override { return after_; }
  std::string decode(const std::vector<int32_t>& ids) const override;
  std::string token_bytes(int32_t id) const override;
  int32_t added_token(std::string_view content) const override;
  int32_t end_of_text() const override { return end_of_text_; }
  size_t stable_prefix(std::string_view text) const override;
  uint64_t fingerprint() const override { return fingerprint_; }
  void save(const std::filesystem::path& folder) const override;

 private:
  class Segments;
  void read_post_processor(const Field& field);
  void read_template(const Field& field);
  void fill_tokens(const Field& decoder);
  const std::string& checked_token(int32_t id) const;

  std::vector<AddedToken> added_;
  std::array<AddedTokenFinder, 2> finders_;  // [normalized]
  std::unique_ptr<Segments> segments_;       // text between added tokens -> ids
  std::vector<int32_t> before_, after_;
  std::vector<std::string> tokens_;  // what decoding makes of each id
  // Decoding takes these off the beginning of a text: `lead_` up to `lead_count_` times.
  std::string lead_;
  size_t lead_count_ = 0;
  std::string dropped_at_start_;  // goes from the first token, wherever it stands there
  int32_t end_of_text_ = -1;
  uint64_t fingerprint_ = 0;
  std::string definition_;  // the JSON, compact
};

}  // namespace natslm::data
