// The head sizes that the GPU kernels of attention exist for: 64 and 128 on all paths, 256 on the
// portable ones (cuda/). Operators and caches fill smaller heads up with zeros, which change no
// score and add channels of zeros to the outputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace natslm::kernels {

inline constexpr int32_t kGpuHeadDims[] = {64, 128, 256};

// The smallest of them that holds a head of this size; the size itself if none does.
constexpr int32_t gpu_head_dim(int32_t head_dim) {
  for (const int32_t size : kGpuHeadDims) {
    if (head_dim <= size) return size;
  }
  return head_dim;
}

constexpr bool is_gpu_head_dim(int32_t head_dim) {
  for (const int32_t size : kGpuHeadDims) {
    if (head_dim == size) return true;
  }
  return false;
}

// Calls f<head_dim>() for one of them; why_not has refused every other.
template <class F>
void with_gpu_head_dim(int32_t head_dim, const F& f) {
  static_assert(sizeof(kGpuHeadDims) == 3 * sizeof(int32_t), "a case for each size");
  if (head_dim == 64) {
    f.template operator()<64>();
  } else if (head_dim == 128) {
    f.template operator()<128>();
  } else {
    f.template operator()<256>();
  }
}

}  // namespace natslm::kernels
