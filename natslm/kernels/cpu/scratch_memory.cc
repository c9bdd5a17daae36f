// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/cpu/scratch_memory.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace natslm::kernels::cpu {
namespace {

constexpr size_t kAlignment = 128;

class Pool {
 public:
  ~Pool() {
    for (const auto& [size, memory] : idle_) std::free(memory);
  }

  float* take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = idle_.find(bytes); found != idle_.end()) {
        float* memory = found->second;
        idle_.erase(found);
        idle_bytes_ -= bytes;
        return memory;
      }
    }
    void* memory = std::aligned_alloc(kAlignment, bytes);
    if (!memory) throw std::bad_alloc();
    return static_cast<float*>(memory);
  }

  void give_back(float* memory, size_t bytes) {
    const std::lock_guard lock(mutex_);
    // Sizes that no call asks for any more would fill the pool for ever: the smallest goes first.
    while (idle_bytes_ + bytes > kKeptScratchBytes && !idle_.empty()) {
      idle_bytes_ -= idle_.begin()->first;
      std::free(idle_.begin()->second);
      idle_.erase(idle_.begin());
    }
    if (bytes > kKeptScratchBytes) return std::free(memory);
    idle_.emplace(bytes, memory);
    idle_bytes_ += bytes;
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, float*> idle_;
  size_t idle_bytes_ = 0;
};

Pool& pool() {
  static Pool the_pool;
  return the_pool;
}

}  // namespace

void ScratchReturner::operator()(float* memory) const {
  pool().give_back(memory, bytes);
}

ScratchMemory scratch_memory(int64_t count) {
  const size_t wanted = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(float);
  const size_t bytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
  return ScratchMemory(pool().take(bytes), ScratchReturner{bytes});
}

}  // namespace natslm::kernels::cpu
