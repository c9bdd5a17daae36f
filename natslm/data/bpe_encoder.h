// The inner loop of byte-level BPE: one piece of text to ids, and a cache of short pieces. Internal
// to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
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

// What turning a piece into ids needs of a vocabulary.
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
  void encode_short(std::string_view piece, std::vector<int32_t>& ids) const;
  void encode_long(std::string_view piece, std::vector<int32_t>& ids) const;

  std::array<int32_t, 256> byte_ids_;
  MergeTable merges_;
  std::unordered_map<std::string, int32_t> whole_;
};

// The ids of pieces met before. A fixed number of slots; a new piece replaces what its slot held.
// Not for several threads at once.
class PieceCache {
 public:
  PieceCache() : slots_(kSlots) {}

  // Appends the ids of the piece. `readable`: the end of the memory that may be read, not before
  // the end of the piece.
  void encode(std::string_view piece, const char* readable, const PieceEncoder& encoder,
              std::vector<int32_t>& ids) {
    if (piece.size() > kMostBytes) return encoder.encode(piece, ids);
    const Key words = padded(piece, readable);
    Slot& slot = slots_[slot_of(words, piece.size())];
    if (slot.bytes != piece.size() || slot.words != words) {
      return fill(slot, words, piece, encoder, ids);
    }
    // Most pieces are one token; a loop would cost more than the store.
    ids.push_back(slot.ids[0]);
    if (slot.count > 1) ids.insert(ids.end(), slot.ids.begin() + 1, slot.ids.begin() + slot.count);
  }

 private:
  static constexpr size_t kSlots = size_t{1} << 15;
  static constexpr size_t kMostBytes = 32, kMostIds = 7;
  using Key = std::array<uint64_t, 4>;

  // One cache line.
  struct alignas(64) Slot {
    Key words{};        // the piece, padded with zeros
    uint8_t bytes = 0;  // 0: free
    uint8_t count = 0;  // at least 1
    std::array<int32_t, kMostIds> ids{};
  };
  static_assert(sizeof(Slot) == 64);

  static Key padded(std::string_view piece, const char* readable) {
    Key words{};
    if (piece.data() + sizeof words <= readable && piece.size() <= 8) {
      std::memcpy(&words[0], piece.data(), 8);
      words[0] &= ~uint64_t{0} >> (64 - 8 * piece.size());
    } else {
      std::memcpy(words.data(), piece.data(), piece.size());
    }
    return words;
  }
  static size_t slot_of(const Key& words, size_t bytes) {
    uint64_t hash = (words[0] ^ bytes) * 0x9E3779B97F4A7C15u;
    if (bytes > 8) {
      hash = (hash ^ (hash >> 32) ^ words[1]) * 0xD6E8FEB86659FD93u;
      hash = (hash ^ (hash >> 32) ^ words[2]) * 0xCF1BBCDCB7A56463u;
      hash = (hash ^ (hash >> 32) ^ words[3]) * 0x9E3779B97F4A7C15u;
    }
    return hash >> (64 - 15);
  }
  static void fill(Slot& slot, const Key& words, std::string_view piece,
                   const PieceEncoder& encoder, std::vector<int32_t>& ids);

  std::vector<Slot> slots_;
};

}  // namespace natslm::data
