// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/dataset.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"

namespace natslm::data {

// A balanced Feistel network permutes the smallest 2^(2k) >= size numbers; walking on until the
// number is below `size` (on average fewer than four steps) makes it a permutation of those alone
// (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
WindowOrder::WindowOrder(int64_t size, uint64_t seed, uint64_t epoch)
    : size_(static_cast<uint64_t>(size)), key_(mix64(mix64(seed) ^ epoch)) {
  NATSLM_ASSERT(size > 0);
  half_bits_ = std::max(1, (static_cast<int>(std::bit_width(size_ - 1)) + 1) / 2);
}

int64_t WindowOrder::operator()(int64_t index) const {
  NATSLM_ASSERT(index >= 0 && static_cast<uint64_t>(index) < size_);
  constexpr int kRounds = 6;
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  auto value = static_cast<uint64_t>(index);
  do {
    uint64_t left = value >> half_bits_, right = value & mask;
    for (int round = 0; round < kRounds; ++round) {
      // The round's number above the bits of `right`, which has at most 32.
      const uint64_t mixed = mix64(key_ ^ (uint64_t(round + 1) << 40 | right));
      left = std::exchange(right, (left ^ mixed) & mask);
    }
    value = left << half_bits_ | right;
  } while (value >= size_);
  return static_cast<int64_t>(value);
}

TokenDataset::TokenDataset(std::vector<PackedTokens> files, uint64_t seed)
    : files_(std::move(files)), seed_(seed) {
  NATSLM_CHECK(!files_.empty(), "a dataset needs at least one packed token file");
  const PackedTokens& first = files_.front();
  vocabulary_ = first.vocabulary();
  for (const PackedTokens& file : files_) {
    NATSLM_CHECK(file.vocabulary() == vocabulary_ &&
                     file.tokenizer_fingerprint() == first.tokenizer_fingerprint(),
                 file.path().string(), " was packed with another tokenizer than ",
                 first.path().string(), "; pack both with the same one");
    tokens_ += file.size();
  }
}

TokenDataset::TokenDataset(std::vector<int32_t> tokens, int32_t vocabulary, uint64_t seed)
    : memory_(std::move(tokens)),
      vocabulary_(vocabulary),
      tokens_(static_cast<int64_t>(memory_.size())),
      seed_(seed) {
  for (const int32_t id : memory_) {
    NATSLM_CHECK(id >= 0 && id < vocabulary, "token id ", id, " is outside the vocabulary of ",
                 vocabulary);
  }
}

namespace {
int64_t windows_in(int64_t tokens, int64_t context) {
  return tokens > context ? (tokens - 1) / context : 0;
}
}  // namespace

int64_t TokenDataset::windows(int64_t context) const {
  NATSLM_CHECK(context > 0, "a context of ", context, " tokens is not possible: at least 1");
  if (files_.empty()) return windows_in(tokens_, context);
  int64_t sum = 0;
  for (const PackedTokens& file : files_) sum += windows_in(file.size(), context);
  return sum;
}

void TokenDataset::window(int64_t window, int64_t context, int32_t* out) const {
  NATSLM_CHECK(window >= 0 && window < windows(context), "window ", window, " of ",
               windows(context), " was asked for");
  if (files_.empty()) {
    std::copy_n(memory_.begin() + window * context, context + 1, out);
    return;
  }
  for (const PackedTokens& file : files_) {
    const int64_t here = windows_in(file.size(), context);
    if (window < here) return file.read(window * context, context + 1, out);
    window -= here;
  }
}

void TokenDataset::fill_samples(int64_t first, int64_t count, int64_t context, int32_t* out,
                                int64_t* ids) const {
  const int64_t size = windows(context);
  NATSLM_CHECK(size > 0, "the text has ", tokens_, " tokens, a window needs ", context + 1,
               " in one file; give more text or a shorter context");
  NATSLM_CHECK(first >= 0, "sample ", first, " was asked for; the first is 0");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sample = first + i;
    const WindowOrder order(size, seed_, static_cast<uint64_t>(sample / size));
    window(order(sample % size), context, out + i * (context + 1));
    if (ids) ids[i] = sample;
  }
}

}  // namespace natslm::data
