// Working memory of the CPU kernels, kept from call to call.
//
// A kernel needs some megabytes for milliseconds. Taken from the system each time, they cost a page
// fault for every 4 KB: a sixth of the time of a backward pass over 2,048 tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace natslm::kernels::cpu {

struct ScratchReturner {
  size_t bytes = 0;
  void operator()(float* memory) const;
};
using ScratchMemory = std::unique_ptr<float[], ScratchReturner>;

// `count` floats with any content, aligned for every vector; they go back by themselves. Up to
// kKeptScratchBytes of what came back stay with the process for the next call. Thread-safe.
ScratchMemory scratch_memory(int64_t count);

inline constexpr size_t kKeptScratchBytes = size_t{64} << 20;

}  // namespace natslm::kernels::cpu
