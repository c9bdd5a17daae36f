// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/head_store.h"

#include <algorithm>

#include "natslm/base/error.h"

namespace natslm::cache {
namespace {

using kernels::kPageKeys;

int32_t pages_for(int32_t keys) {
  return (keys + kPageKeys - 1) / kPageKeys;
}

template <class Element>
void store_rows(const PageLayout& layout, const std::vector<void*>& pages, int32_t begin,
                const FreshRows& fresh) {
  const int32_t d = layout.head_dim;
  const auto* k = static_cast<const Element*>(fresh.k);
  const auto* v = static_cast<const Element*>(fresh.v);
  for (int32_t t = 0; t < fresh.count;) {
    const int32_t slot = (begin + t) % kPageKeys;
    const int32_t n = std::min(fresh.count - t, kPageKeys - slot);
    auto* keys = static_cast<Element*>(pages[(begin + t) / kPageKeys]);
    Element* values = keys + int64_t{d} * kPageKeys;
    for (int32_t c = 0; c < d; ++c) {
      for (int32_t j = 0; j < n; ++j) {
        keys[c * kPageKeys + slot + j] = k[(t + j) * fresh.row_stride + c];
      }
    }
    for (int32_t j = 0; j < n; ++j) {
      std::copy_n(v + (t + j) * fresh.row_stride, d, values + int64_t{slot + j} * d);
    }
    t += n;
  }
}

template <class Element>
void move_row(const PageLayout& layout, void* from_page, int32_t from, void* to_page, int32_t to) {
  const int32_t d = layout.head_dim;
  auto* source = static_cast<Element*>(from_page);
  auto* target = static_cast<Element*>(to_page);
  for (int32_t c = 0; c < d; ++c) target[c * kPageKeys + to] = source[c * kPageKeys + from];
  const int64_t values = int64_t{d} * kPageKeys;
  std::copy_n(source + values + int64_t{from} * d, d, target + values + int64_t{to} * d);
}

// Memory follows the keys down, but not at every small step.
template <class T>
void resize_tight(std::vector<T>& v, size_t size) {
  v.resize(size);
  if (v.capacity() > 2 * size + kPageKeys) v.shrink_to_fit();
}

}  // namespace

void HeadStore::reserve(PagePool& pool, int32_t fresh) {
  const int32_t needed = pages_for(count() + fresh);
  pages_.reserve(needed);
  while (static_cast<int32_t>(pages_.size()) < needed) pages_.push_back(pool.take());
}

void HeadStore::append(const PageLayout& layout, const FreshRows& fresh, bool with_mass) {
  const int32_t begin = count();
  NATSLM_ASSERT(static_cast<int32_t>(pages_.size()) == pages_for(begin + fresh.count));
  if (layout.element_bytes == 4)
    store_rows<uint32_t>(layout, pages_, begin, fresh);
  else
    store_rows<uint16_t>(layout, pages_, begin, fresh);
  for (int32_t t = 0; t < fresh.count; ++t) {
    position_.push_back(fresh.first_position + t);
    last_.push_back(fresh.last[t]);
    next_expiry_ = std::min(next_expiry_, fresh.last[t]);
  }
  score_.resize(position_.size(), 0.0f);
  if (with_mass) mass_.resize(position_.size(), 0.0f);
}

void HeadStore::move_key(const PageLayout& layout, int32_t from, int32_t to) {
  void* from_page = pages_[from / kPageKeys];
  void* to_page = pages_[to / kPageKeys];
  if (layout.element_bytes == 4) {
    move_row<uint32_t>(layout, from_page, from % kPageKeys, to_page, to % kPageKeys);
  } else {
    move_row<uint16_t>(layout, from_page, from % kPageKeys, to_page, to % kPageKeys);
  }
  position_[to] = position_[from];
  last_[to] = last_[from];
  score_[to] = score_[from];
  if (!mass_.empty()) mass_[to] = mass_[from];
}

void HeadStore::evict(PagePool& pool, const PageLayout& layout, int32_t now, bool edited) {
  if (!edited && !dead(now, next_expiry_)) return;
  int32_t live = count();
  // From the back, so that the key that moves into a hole is known to be alive.
  for (int32_t j = live - 1; j >= 0; --j) {
    if (!dead(now, last_[j])) continue;
    --live;
    if (j != live) move_key(layout, live, j);
  }
  if (live != count()) {
    resize_tight(position_, live);
    resize_tight(last_, live);
    resize_tight(score_, live);
    if (!mass_.empty()) resize_tight(mass_, live);
    while (static_cast<int32_t>(pages_.size()) > pages_for(live)) {
      pool.give_back(pages_.back());
      pages_.pop_back();
    }
    if (pages_.capacity() > 2 * pages_.size() + 8) pages_.shrink_to_fit();
  }
  next_expiry_ = kForever;
  for (const int32_t last : last_) next_expiry_ = std::min(next_expiry_, last);
}

void HeadStore::clear(PagePool& pool) {
  for (void* page : pages_) pool.give_back(page);
  *this = HeadStore();
}

StoredKeys HeadStore::view() {
  return {position_, last_, score_, mass_};
}

kernels::CachedKeys HeadStore::cached(bool with_mass) {
  kernels::CachedKeys keys;
  keys.pages = pages_.data();
  keys.position = position_.data();
  keys.last = last_.data();
  keys.mass = with_mass ? mass_.data() : nullptr;
  keys.count = count();
  return keys;
}

int64_t HeadStore::metadata_bytes() const {
  return static_cast<int64_t>(pages_.capacity() * sizeof(void*) +
                              (position_.capacity() + last_.capacity()) * sizeof(int32_t) +
                              (score_.capacity() + mass_.capacity()) * sizeof(float));
}

}  // namespace natslm::cache
