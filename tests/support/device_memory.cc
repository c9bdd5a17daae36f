// SPDX-License-Identifier: Apache-2.0
#include "tests/support/device_memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace natslm::test {
namespace {

constexpr size_t kGuard = 1024;  // bytes on each side; a multiple of every alignment asked for

std::vector<uint8_t> guard(size_t bytes) {
  std::vector<uint8_t> pattern(bytes);
  for (size_t i = 0; i < bytes; ++i) pattern[i] = i % 2 ? 0x7f : 0xff;  // bf16 0x7fff
  return pattern;
}

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
  const std::vector<uint8_t> pattern = guard(kGuard);
  begin_ = static_cast<uint8_t*>(memory_.allocate(2 * kGuard + size_));
  memory_.upload(begin_, pattern.data(), kGuard);
  memory_.upload(begin_ + kGuard + size_, pattern.data(), kGuard);
  fill(value);
}

GuardedArray::GuardedArray(Memory& memory, const void* from, size_t bytes)
    : GuardedArray(memory, bytes, 0) {
  if (bytes > 0) memory_.upload(data(), from, bytes);
}

GuardedArray::~GuardedArray() {
  memory_.release(begin_);
}

void* GuardedArray::data() const {
  return begin_ + kGuard;
}

void GuardedArray::fill(uint8_t value) {
  if (size_ > 0) memory_.fill(data(), value, size_);
}

std::vector<uint8_t> GuardedArray::bytes() const {
  return read<uint8_t>();
}

bool GuardedArray::guards_are_intact() const {
  const std::vector<uint8_t> pattern = guard(kGuard);
  std::vector<uint8_t> before(kGuard), after(kGuard);
  memory_.download(before.data(), begin_, kGuard);
  memory_.download(after.data(), begin_ + kGuard + size_, kGuard);
  return before == pattern && after == pattern;
}

}  // namespace natslm::test
