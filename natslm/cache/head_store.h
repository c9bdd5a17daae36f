// The live keys and values of one (sequence, layer, KV head): dense in pages of kPageKeys, in an
// order that eviction changes, because the last key moves into the place of a dead one.
//
// Invariant between calls: pages() has exactly ceil(count() / kPageKeys) entries.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "natslm/cache/page_pool.h"
#include "natslm/cache/policy.h"
#include "natslm/kernels/attention_decode.h"

namespace natslm::cache {

// How the elements of a page lie: [D, kPageKeys] keys, then [kPageKeys, D] values.
struct PageLayout {
  int32_t head_dim = 0;
  int32_t element_bytes = 0;  // 2 or 4
};

// New keys and values of one head: row t begins at k + t * row_stride elements.
struct FreshRows {
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t row_stride = 0;
  int32_t count = 0;
  int32_t first_position = 0;
  const int32_t* last = nullptr;  // [count]
};

class HeadStore {
 public:
  HeadStore() = default;
  HeadStore(HeadStore&&) noexcept = default;
  HeadStore& operator=(HeadStore&&) noexcept = default;

  int32_t count() const { return static_cast<int32_t>(position_.size()); }

  // Makes room for `count` more keys (the only call that takes pages).
  void reserve(PagePool& pool, int32_t count);
  // Stores rows that reserve() made room for.
  void append(const PageLayout& layout, const FreshRows& fresh, bool with_mass);
  // Removes every key with last < now and gives empty pages back. `edited`: the lifetimes may have
  // been changed since the last call, so that none is taken for granted.
  void evict(PagePool& pool, const PageLayout& layout, int32_t now, bool edited);
  // Gives everything back.
  void clear(PagePool& pool);

  StoredKeys view();
  kernels::CachedKeys cached(bool with_mass);
  const std::vector<int32_t>& position() const { return position_; }
  const std::vector<int32_t>& last() const { return last_; }
  const std::vector<void*>& pages() const { return pages_; }
  // Positions, lifetimes, scores and the page table, as allocated.
  int64_t metadata_bytes() const;

 private:
  void move_key(const PageLayout& layout, int32_t from, int32_t to);

  std::vector<void*> pages_;
  std::vector<int32_t> position_, last_;
  std::vector<float> score_, mass_;
  int32_t next_expiry_ = kForever;  // no key dies before a step later than this
};

}  // namespace natslm::cache
