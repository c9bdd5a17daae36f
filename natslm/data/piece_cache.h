// A cache between a text's pieces and their ids. Internal to data/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

namespace natslm::data {

// The ids of pieces met before. A fixed number of slots; a new piece replaces what its slot held.
// Not for several threads at once.
class PieceCache {
 public:
  PieceCache() : slots_(kSlots) {}

  // Appends the ids of the piece. `readable`: the end of the memory that may be read, not before
  // the end of the piece.
  template <class Encoder>
  void encode(std::string_view piece, const char* readable, const Encoder& encoder,
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

  template <class Encoder>
  static void fill(Slot& slot, const Key& words, std::string_view piece, const Encoder& encoder,
                   std::vector<int32_t>& ids) {
    const size_t before = ids.size();
    encoder.encode(piece, ids);
    const size_t count = ids.size() - before;
    if (count == 0 || count > kMostIds) return;
    slot.words = words;
    slot.bytes = static_cast<uint8_t>(piece.size());
    slot.count = static_cast<uint8_t>(count);
    std::copy(ids.begin() + before, ids.end(), slot.ids.begin());
  }

  std::vector<Slot> slots_;
};

// Caches are lent to one call at a time, so that a tokenizer may be used from several threads.
class PieceCachePool {
 public:
  class Lease {
   public:
    explicit Lease(PieceCachePool& owner) : owner_(owner) {
      const std::lock_guard lock(owner_.mutex_);
      if (!owner_.caches_.empty()) {
        cache_ = std::move(owner_.caches_.back());
        owner_.caches_.pop_back();
      }
    }
    ~Lease() {
      if (!cache_) return;
      const std::lock_guard lock(owner_.mutex_);
      owner_.caches_.push_back(std::move(cache_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    PieceCache& operator*() {
      if (!cache_) cache_ = std::make_unique<PieceCache>();
      return *cache_;
    }

   private:
    PieceCachePool& owner_;
    std::unique_ptr<PieceCache> cache_;
  };

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<PieceCache>> caches_;
};

}  // namespace natslm::data
