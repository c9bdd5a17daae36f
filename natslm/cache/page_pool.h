// Where the pages of a cache come from. A page that is given back leaves at once for the memory
// resource behind the pool, so that what the cache accounts for is what was allocated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>

namespace natslm::cache {

class PagePool {
 public:
  // A page has `key_bytes` for keys and values and `metadata_bytes` beside them. `memory` must
  // outlive the pool and every page taken from it.
  PagePool(int64_t key_bytes, int64_t metadata_bytes, std::pmr::memory_resource* memory)
      : key_bytes_(key_bytes), metadata_bytes_(metadata_bytes), memory_(memory) {}
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // 64-byte aligned, not initialised. Throws std::bad_alloc.
  void* take() {
    void* page = memory_->allocate(key_bytes_ + metadata_bytes_, kAlignment);
    ++pages_;
    return page;
  }
  void give_back(void* page) {
    memory_->deallocate(page, key_bytes_ + metadata_bytes_, kAlignment);
    --pages_;
  }

  // Of one page.
  int64_t key_bytes() const { return key_bytes_; }
  int64_t metadata_bytes() const { return metadata_bytes_; }
  // Of all pages that are out, their metadata not counted.
  int64_t held_bytes() const { return pages_ * key_bytes_; }

 private:
  static constexpr size_t kAlignment = 64;
  int64_t key_bytes_, metadata_bytes_;
  std::pmr::memory_resource* memory_;
  int64_t pages_ = 0;
};

}  // namespace natslm::cache
