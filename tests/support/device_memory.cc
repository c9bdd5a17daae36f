// SPDX-License-Identifier: Apache-2.0
#include "tests/support/device_memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace natslm::test {
namespace {

constexpr size_t kGuard = 1024;       // bytes on each side; a multiple of every alignment
constexpr uint8_t kGuardByte = 0x7f;  // 3.4e38 as bf16 and as float, 2.1e9 as int32

class HostMemory : public Memory {
 public:
  void* allocate(size_t bytes) override { return ::operator new(bytes, kAlignment); }
  void release(void* memory) override { ::operator delete(memory, kAlignment); }
  void upload(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void fill(void* to, uint8_t value, size_t bytes) override { std::memset(to, value, bytes); }
  CUstream_st* stream() override { return nullptr; }
  void finish() override {}

 private:
  static constexpr std::align_val_t kAlignment{256};
};

}  // namespace

std::unique_ptr<Memory> host_memory() {
  return std::make_unique<HostMemory>();
}

GuardedArray::GuardedArray(Memory& memory, size_t bytes, uint8_t value)
    : memory_(memory), size_(bytes) {
  begin_ = static_cast<uint8_t*>(memory_.allocate(2 * kGuard + size_));
  memory_.fill(begin_, kGuardByte, 2 * kGuard + size_);
  if (size_ > 0) memory_.fill(data(), value, size_);
}

GuardedArray::GuardedArray(Memory& memory, const void* from, size_t bytes)
    : memory_(memory), size_(bytes) {
  begin_ = static_cast<uint8_t*>(memory_.allocate(2 * kGuard + size_));
  memory_.fill(begin_, kGuardByte, 2 * kGuard + size_);
  if (size_ > 0) memory_.upload(data(), from, size_);
}

GuardedArray::~GuardedArray() {
  memory_.release(begin_);
}

void* GuardedArray::data() const {
  return begin_ + kGuard;
}

std::vector<uint8_t> GuardedArray::everything() {
  std::vector<uint8_t> all(2 * kGuard + size_);
  memory_.download(all.data(), begin_, all.size());
  return all;
}

std::vector<uint8_t> GuardedArray::bytes() {
  const std::vector<uint8_t> all = everything();
  return {all.begin() + kGuard, all.end() - kGuard};
}

bool GuardedArray::guards_are_intact() {
  const std::vector<uint8_t> all = everything();
  const auto intact = [](auto first) {
    return std::all_of(first, first + kGuard, [](uint8_t byte) { return byte == kGuardByte; });
  };
  return intact(all.begin()) && intact(all.end() - kGuard);
}

}  // namespace natslm::test
