// Memory in which a kernel under test works: the host's or a GPU's, with guards around every array.
//
// A test that needs a GPU runs in a child process (see isolated.h): a kernel that hangs or breaks
// the device then costs one answer, not the whole run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

struct CUstream_st;

namespace natslm::test {

class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* allocate(size_t bytes) = 0;  // 256-byte aligned
  virtual void release(void* memory) = 0;
  virtual void upload(void* to, const void* from, size_t bytes) = 0;
  virtual void download(void* to, const void* from, size_t bytes) = 0;
  virtual void fill(void* to, uint8_t value, size_t bytes) = 0;
  // What the kernels are launched on: not the default stream, and unordered with it.
  virtual CUstream_st* stream() = 0;
  // Waits for the stream. Throws Error naming what went wrong on the device.
  virtual void finish() = 0;
};

std::unique_ptr<Memory> host_memory();
// Throws Error in a build without CUDA and where no GPU can be used.
std::unique_ptr<Memory> gpu_memory();

// What the GPU is, or, after "no: ", why there is none. Starts CUDA in this process.
std::string describe_gpu();

// One array. Before and after it lie guards: huge numbers in any type, so that a read outside shows
// in the results; a write there shows in guards_are_intact().
class GuardedArray {
 public:
  GuardedArray(Memory& memory, size_t bytes, uint8_t fill);
  GuardedArray(Memory& memory, const void* from, size_t bytes);
  template <class T>
  GuardedArray(Memory& memory, const std::vector<T>& from)
      : GuardedArray(memory, from.data(), from.size() * sizeof(T)) {}
  ~GuardedArray();
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;

  void* data() const;
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  // What it holds; also looks at the guards.
  std::vector<uint8_t> bytes();
  template <class T>
  std::vector<T> read() {
    const std::vector<uint8_t> raw = bytes();
    std::vector<T> all(raw.size() / sizeof(T));
    if (!all.empty()) std::memcpy(all.data(), raw.data(), all.size() * sizeof(T));
    return all;
  }
  bool guards_are_intact();

 private:
  // Guards and all, in one transfer.
  std::vector<uint8_t> everything();

  Memory& memory_;
  uint8_t* begin_ = nullptr;
  size_t size_ = 0;
};

}  // namespace natslm::test
