// What is known of the live keys of one (sequence, layer, KV head), and the pages they lie in:
// dense, in an order that eviction changes, because the last keys move into the places of dead
// ones. The pages' memory itself is a PageStorage's.
//
// Invariant between calls: pages() has exactly ceil(count() / kPageKeys) entries.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "natslm/cache/page_pool.h"
#include "natslm/cache/policy.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/kernels/page_moves.h"

namespace natslm::cache {

// What an eviction leaves to be done in the pages' memory, in this order.
struct Evicted {
  std::vector<kernels::PageMove> moves;  // no place is in two of them
  std::vector<void*> pages;              // now empty, to be given back
  void clear() {
    moves.clear();
    pages.clear();
  }
};

class HeadStore {
 public:
  HeadStore() = default;
  HeadStore(HeadStore&&) noexcept = default;
  HeadStore& operator=(HeadStore&&) noexcept = default;

  int32_t count() const { return static_cast<int32_t>(position_.size()); }

  // Makes room for `count` more keys (the only call that takes pages).
  void reserve(PagePool& pool, int32_t count);
  // New keys at positions first_position .. , that reserve() made room for.
  void append(int32_t first_position, std::span<const int32_t> last, bool with_mass);
  // Forgets every key with last < now; adds to `evicted`. `edited`: the lifetimes may have been
  // changed since the last call, so that none is taken for granted.
  void evict(int32_t now, bool edited, Evicted& evicted);
  // Forgets everything; the pages go to `evicted`.
  void clear(Evicted& evicted);

  StoredKeys view();
  kernels::CachedKeys cached(bool with_mass);
  const std::vector<int32_t>& position() const { return position_; }
  const std::vector<int32_t>& last() const { return last_; }
  const std::vector<void*>& pages() const { return pages_; }
  // Positions, lifetimes, scores and the page table, as allocated.
  int64_t metadata_bytes() const;

  // A storage whose pages hold lifetimes too keeps here what they hold, to know what to change.
  std::vector<int32_t>& last_in_pages() { return last_in_pages_; }

 private:
  void move_key(int32_t from, int32_t to);

  std::vector<void*> pages_;
  std::vector<int32_t> position_, last_, last_in_pages_;
  std::vector<float> score_, mass_;
  int32_t next_expiry_ = kForever;  // no key dies before a step later than this
};

}  // namespace natslm::cache
