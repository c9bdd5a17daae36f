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

void HeadStore::append(int32_t first_position, std::span<const int32_t> last, bool with_mass) {
  NATSLM_ASSERT(std::ssize(pages_) == pages_for(count() + static_cast<int32_t>(last.size())));
  for (const int32_t end : last) {
    position_.push_back(first_position++);
    last_.push_back(end);
    next_expiry_ = std::min(next_expiry_, end);
  }
  score_.resize(position_.size(), 0.0f);
  if (with_mass) mass_.resize(position_.size(), 0.0f);
}

void HeadStore::move_key(int32_t from, int32_t to) {
  position_[to] = position_[from];
  last_[to] = last_[from];
  score_[to] = score_[from];
  if (!mass_.empty()) mass_[to] = mass_[from];
  if (!last_in_pages_.empty()) last_in_pages_[to] = last_in_pages_[from];
}

void HeadStore::evict(int32_t now, bool edited, Evicted& evicted) {
  if (!edited && !dead(now, next_expiry_)) return;
  const auto is_dead = [&](int32_t j) { return dead(now, last_[j]); };
  int32_t live = 0;
  next_expiry_ = kForever;
  for (const int32_t last : last_) {
    if (dead(now, last)) continue;
    ++live;
    next_expiry_ = std::min(next_expiry_, last);
  }
  if (live == count()) return;

  // As many live keys lie past the new end as there are holes before it.
  int32_t source = count();
  for (int32_t j = 0; j < live; ++j) {
    if (!is_dead(j)) continue;
    while (is_dead(--source)) {
    }
    evicted.moves.push_back(
        {pages_[source / kPageKeys], pages_[j / kPageKeys], source % kPageKeys, j % kPageKeys});
    move_key(source, j);
  }
  resize_tight(position_, live);
  resize_tight(last_, live);
  resize_tight(score_, live);
  if (!mass_.empty()) resize_tight(mass_, live);
  if (!last_in_pages_.empty()) resize_tight(last_in_pages_, live);
  while (std::ssize(pages_) > pages_for(live)) {
    evicted.pages.push_back(pages_.back());
    pages_.pop_back();
  }
  if (pages_.capacity() > 2 * pages_.size() + 8) pages_.shrink_to_fit();
}

void HeadStore::clear(Evicted& evicted) {
  evicted.pages.insert(evicted.pages.end(), pages_.begin(), pages_.end());
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
  return static_cast<int64_t>(
      pages_.capacity() * sizeof(void*) +
      (position_.capacity() + last_.capacity() + last_in_pages_.capacity()) * sizeof(int32_t) +
      (score_.capacity() + mass_.capacity()) * sizeof(float));
}

}  // namespace natslm::cache
