// The inner loop of BPE: the symbols that a piece of text begins as, merged to ids. Internal to
// data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace natslm::data {

// Merges by pair of ids: open addressing, mostly one cache line a lookup.
class MergeTable {
 public:
  static constexpr uint32_t kNone = 0xffffffffu;
  struct Entry {
    uint64_t pair = 0;      // left id << 32 | right id
    uint32_t rank = kNone;  // place in the list of merges; kNone: no such merge
    int32_t result = 0;
  };

  explicit MergeTable(size_t merges);
  // False when the pair is there already.
  bool add(int32_t left, int32_t right, uint32_t rank, int32_t result);
  Entry find(int32_t left, int32_t right) const { return entries_[place(key(left, right))]; }

 private:
  static uint64_t key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  size_t place(uint64_t pair) const {
    size_t at = (pair * 0x9E3779B97F4A7C15u) >> shift_;
    while (entries_[at].rank != kNone && entries_[at].pair != pair) {
      at = (at + 1) & (entries_.size() - 1);
    }
    return at;
  }

  std::vector<Entry> entries_;  // a power of two, at most half of them taken
  int shift_;
};

// Merges the symbols and appends what is left. Time: O(n log n). symbols: used up.
void merge_symbols(const MergeTable& merges, std::vector<int32_t>& symbols,
                   std::vector<int32_t>& ids);

// Byte-level BPE: a symbol a byte.
class PieceEncoder {
 public:
  // byte_ids: -1 for a byte without a token, which is left out as if it were not in the text.
  // whole: pieces that are one token whatever the merges say.
  PieceEncoder(const std::array<int32_t, 256>& byte_ids, MergeTable merges,
               std::unordered_map<std::string, int32_t> whole);
  // Appends the ids. Time: pieces of n bytes O(n log n).
  void encode(std::string_view piece, std::vector<int32_t>& ids) const;
  int32_t byte_id(char byte) const { return byte_ids_[static_cast<unsigned char>(byte)]; }

 private:
  std::array<int32_t, 256> byte_ids_;
  MergeTable merges_;
  std::unordered_map<std::string, int32_t> whole_;
};

}  // namespace natslm::data
