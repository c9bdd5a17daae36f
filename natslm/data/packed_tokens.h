// Token ids in a file that is mapped, not read: a 64-byte header, then the ids as little-endian u16
// (vocabulary
// <= 65,536) or u32. The header holds magic, version, vocabulary, width, count, the tokenizer's
// fingerprint and checksums of itself and of the ids; a file that does not fit them is refused.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>

#include "natslm/base/atomic_file.h"
#include "natslm/data/corpus.h"
#include "natslm/data/tokenizer.h"

namespace natslm::data {

// True when the file begins with the magic bytes (it may still be damaged).
bool is_packed_tokens(const std::filesystem::path& path);

// A packed file, open for reading. Copies share the mapping.
class PackedTokens {
 public:
  // Checks the header and, with `verify`, the ids' checksum (reads the whole file once, at memory
  // speed). Throws Error naming the file and what is wrong with it.
  explicit PackedTokens(const std::filesystem::path& path, bool verify = true);
  const std::filesystem::path& path() const;
  int32_t vocabulary() const;
  uint64_t tokenizer_fingerprint() const;
  int64_t size() const;
  // out[0 .. count) = ids [begin, begin + count); throws Error for an id outside the vocabulary.
  void read(int64_t begin, int64_t count, int32_t* out) const;

 private:
  struct Mapped;
  std::shared_ptr<const Mapped> mapped_;
};

// The checksum of a packed file's ids; bytes may be added in any portions. Finds every flipped bit
// and every exchange; it is no defence against forgery.
class TokenChecksum {
 public:
  void add(const void* data, size_t bytes);
  uint64_t value() const;

 private:
  void stripe(const char* at);

  uint64_t lane_[4] = {1, 2, 3, 4};
  uint64_t size_ = 0;
  size_t kept_ = 0;
  char kept_bytes_[32] = {};
};

// Writes a packed file under a temporary name; nothing of it is visible before commit().
class PackedTokensWriter {
 public:
  PackedTokensWriter(const std::filesystem::path& path, int32_t vocabulary, uint64_t fingerprint);
  void append(const int32_t* ids, int64_t count);  // throws Error for an id outside the vocabulary
  int64_t size() const { return count_; }
  void commit();

 private:
  AtomicFile file_;
  int32_t vocabulary_;
  uint64_t fingerprint_;
  int64_t count_ = 0;
  TokenChecksum checksum_;
};

struct PackSummary {
  int64_t documents = 0, tokens = 0;
  uint64_t bytes = 0;  // of text
};
// Called after each block with the bytes done so far and in all; false stops with an Error and
// leaves no file.
using PackProgress = std::function<bool(uint64_t done, uint64_t total)>;

// Tokenises a corpus of any size into `path`, each document followed by end_of_text() if the
// tokenizer has it. Memory: a few blocks, whatever the corpus.
PackSummary pack_corpus(const Corpus& corpus, const Tokenizer& tokenizer,
                        const std::filesystem::path& path, const PackProgress& progress = {});

}  // namespace natslm::data
