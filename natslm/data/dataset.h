// What training reads: windows of T + 1 tokens in an order that is shuffled anew in each epoch. The
// order is a pure function of (seed, epoch): a Feistel permutation of the window numbers, so
// nothing is stored and a resumed run asks for step n and gets exactly what the uninterrupted one
// would have got. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "natslm/data/packed_tokens.h"

namespace natslm::data {

// A permutation of 0 .. size - 1 chosen by (seed, epoch).
class WindowOrder {
 public:
  WindowOrder(int64_t size, uint64_t seed, uint64_t epoch);
  int64_t operator()(int64_t index) const;  // index in [0, size)

 private:
  uint64_t size_, key_;
  int half_bits_;
};

class TokenDataset {
 public:
  // All files must have one vocabulary and tokenizer. No window crosses from one file to the next.
  TokenDataset(std::vector<PackedTokens> files, uint64_t seed);
  // Tokens held in memory; ids must lie in [0, vocabulary).
  TokenDataset(std::vector<int32_t> tokens, int32_t vocabulary, uint64_t seed);

  int32_t vocabulary() const { return vocabulary_; }
  int64_t tokens() const { return tokens_; }
  // Windows of T + 1 tokens, T apart (each token but the first of a file is predicted once): an
  // epoch has that many. 0 when the text is shorter than a window.
  int64_t windows(int64_t context) const;
  // Window number `window` of windows(context): context + 1 ids.
  void window(int64_t window, int64_t context, int32_t* out) const;

  // Samples are numbered through all epochs; step s holds samples s * batch .. s * batch + batch
  // - 1. out: [batch, context + 1]; ids: [batch] sample numbers (unique in a run, the same for any
  // way of batching), may be null. Throws Error when the text is shorter than a window.
  void fill(int64_t step, int64_t batch, int64_t context, int32_t* out, int64_t* ids) const {
    fill_samples(step * batch, batch, context, out, ids);
  }
  // The same for samples first .. first + count - 1: a part of a step for micro-batches and ranks.
  void fill_samples(int64_t first, int64_t count, int64_t context, int32_t* out,
                    int64_t* ids) const;

 private:
  std::vector<PackedTokens> files_;
  std::vector<int32_t> memory_;
  int32_t vocabulary_ = 0;
  int64_t tokens_ = 0;
  uint64_t seed_ = 0;
};

}  // namespace natslm::data
