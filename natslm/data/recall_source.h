// Text that recall tasks are made of: documents as token ids that somebody else holds, in memory or
// in packed files, read at any place without a copy of the whole.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "natslm/data/packed_tokens.h"

namespace natslm::data {

// Memory is not owned and must outlive the document; a packed file stays mapped by it.
class TokenDocument {
 public:
  TokenDocument(std::span<const int32_t> tokens) : tokens_(tokens) {}  // NOLINT: conversions wanted
  TokenDocument(const std::vector<int32_t>& tokens) : tokens_(std::span(tokens)) {}  // NOLINT
  TokenDocument(PackedTokens file) : tokens_(std::move(file)) {}                     // NOLINT
  int64_t size() const;
  // out[0 .. count) = tokens [begin, begin + count), which must exist.
  void read(int64_t begin, int64_t count, int32_t* out) const;

 private:
  std::variant<std::span<const int32_t>, PackedTokens> tokens_;
};

struct TokenSource {
  std::string name;   // in messages: "books"
  double weight = 1;  // how often it is drawn, beside the other sources' weights; 0 or more
  std::vector<TokenDocument> documents;
};

// The documents of a source one after the other, with `separator` between two of them unless the
// first ends with it (-1: nothing between them).
class JoinedText {
 public:
  JoinedText(TokenSource source, int32_t separator);
  const std::string& name() const { return name_; }
  double weight() const { return weight_; }
  int64_t size() const { return size_; }
  // Throws Error naming the source if it has fewer than `count` tokens.
  void check_size(int64_t count) const;
  // out[0 .. count) = tokens [begin, begin + count), which must exist.
  void read(int64_t begin, int64_t count, int32_t* out) const;

 private:
  std::string name_;
  double weight_;
  std::vector<TokenDocument> documents_;
  std::vector<int64_t> first_;  // place of each document's first token
  int32_t separator_;
  int64_t size_ = 0;
};

}  // namespace natslm::data
