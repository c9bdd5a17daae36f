// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/cache/page_storage.h"

namespace natslm::cache {
namespace {

class DeviceMemory final : public std::pmr::memory_resource {
 public:
  explicit DeviceMemory(const at::Device& device) : device_(device) {}

 private:
  static constexpr size_t kPieces = 64;  // of a block
  static constexpr size_t kAlignment = 256;

  struct Block {
    at::Tensor memory;
    std::vector<uint8_t*> free;
  };

  // All pieces of a resource have one size: a cache asks for nothing but its pages.
  void* do_allocate(size_t bytes, [[maybe_unused]] size_t alignment) override {
    NATSLM_ASSERT(alignment <= kAlignment && (bytes_ == 0 || bytes == bytes_));
    bytes_ = bytes;
    if (open_.empty()) add_block();
    // The lowest block with room, so that those above it run empty.
    Block& block = blocks_.at(*open_.begin());
    uint8_t* piece = block.free.back();
    block.free.pop_back();
    if (block.free.empty()) open_.erase(open_.begin());
    return piece;
  }

  void do_deallocate(void* memory, size_t, size_t) override {
    auto* piece = static_cast<uint8_t*>(memory);
    const auto at = std::prev(blocks_.upper_bound(piece));
    Block& block = at->second;
    block.free.push_back(piece);
    open_.insert(at->first);
    if (block.free.size() < kPieces) return;
    // One empty block stays, so that a page that comes and goes costs nothing.
    if (spare_ != nullptr && spare_ != at->first && is_empty(spare_)) {
      open_.erase(at->first);
      blocks_.erase(at);
    } else {
      spare_ = at->first;
    }
  }

  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  bool is_empty(uint8_t* base) const {
    const auto at = blocks_.find(base);
    return at != blocks_.end() && at->second.free.size() == kPieces;
  }

  void add_block() {
    const size_t stride = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    Block block;
    block.memory = at::empty({static_cast<int64_t>(stride * kPieces)},
                             at::TensorOptions(at::kByte).device(device_));
    auto* base = static_cast<uint8_t*>(block.memory.mutable_data_ptr());
    NATSLM_ASSERT(reinterpret_cast<uintptr_t>(base) % kAlignment == 0);
    for (size_t i = kPieces; i-- > 0;) block.free.push_back(base + i * stride);
    open_.insert(base);
    blocks_.emplace(base, std::move(block));
  }

  at::Device device_;
  size_t bytes_ = 0;
  std::map<uint8_t*, Block> blocks_;  // by address
  std::set<uint8_t*> open_;           // blocks with a free piece
  uint8_t* spare_ = nullptr;          // a block that was empty when it was last looked at
};

}  // namespace

std::unique_ptr<std::pmr::memory_resource> make_device_memory(const at::Device& device) {
  return std::make_unique<DeviceMemory>(device);
}

}  // namespace natslm::cache
