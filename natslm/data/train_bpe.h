// Training a byte-level BPE vocabulary. Ids: the 256 bytes in GPT-2's order, then one id a merge,
// then
// <|endoftext|>. Each merge joins the pair that is adjacent most often; of pairs equally often the
// one with the smaller left id, then the smaller right id: the result depends on the text alone,
// not on the order of its documents. Memory: the different pieces of the text, not the text.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "natslm/data/byte_level_bpe.h"
#include "natslm/data/corpus.h"

namespace natslm::data {

struct BpeTrainingOptions {
  int32_t vocabulary = 2048;  // at least 257: the bytes and <|endoftext|>
  int64_t least_count = 2;  // a pair met less often is not merged: a short text gives fewer tokens
  SplitRule split;
};

class BpeTrainer {
 public:
  explicit BpeTrainer(BpeTrainingOptions options);
  ~BpeTrainer();
  // Counts the pieces of a text, or of a block of one that ends where stable_prefix said.
  void add(std::string_view text);
  size_t stable_prefix(std::string_view text) const;
  // Throws Error when nothing was added. May be called once.
  std::unique_ptr<ByteLevelBpe> train();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// Reads the whole corpus once. <|endoftext|> in the text separates documents and is not counted.
std::unique_ptr<ByteLevelBpe> train_bpe(const Corpus& corpus, const BpeTrainingOptions& options);

}  // namespace natslm::data
