// What the host sides of the Hopper attention kernels share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/sm90/tensor_map.h"

namespace natslm::kernels::sm90 {

inline constexpr int32_t kMaxGroup = 8;
inline constexpr size_t kWorkspaceAlignment = 256;

// Query heads that share a KV head. Params: AttentionForward or AttentionBackward.
template <class Params>
int32_t group_of(const Params& p) {
  return p.q_heads / p.kv_heads;
}

// Whether TMA can address the rows of an array [B, heads, T, D] of p: 16-byte steps along every
// axis that has more than one element. An array without elements has no rows to refuse.
template <class Params>
bool has_aligned_rows(const void* array, const Strides& stride, const Params& p, int32_t heads) {
  const auto fits = [](int64_t size, int64_t step) {
    return size <= 1 || (step > 0 && step % 8 == 0 && step < int64_t{1} << 38);
  };
  if (p.batch == 0 || p.tokens == 0) return true;
  return reinterpret_cast<uintptr_t>(array) % 16 == 0 && fits(p.batch, stride.batch) &&
         fits(heads, stride.head) && fits(p.tokens, stride.token);
}

// Keys or values of p by place: axes D, place, Hkv, B; box 64 x rows.
template <class Params>
CUtensorMap key_map(const Params& p, const void* base, const Strides& stride, int32_t rows) {
  return make_tensor_map(base, {{p.head_dim, 1, 64},
                                {p.tokens, stride.token, rows},
                                {p.kv_heads, stride.head, 1},
                                {p.batch, stride.batch, 1}});
}

// All heads of a group: axes D, head of the group, T, Hkv, B; box 64 x group x tile_queries.
template <class Params>
CUtensorMap group_map(const Params& p, const void* base, const Strides& stride,
                      int32_t tile_queries) {
  const int32_t group = group_of(p);
  return make_tensor_map(base, {{p.head_dim, 1, 64},
                                {group, stride.head, group},
                                {p.tokens, stride.token, tile_queries},
                                {p.kv_heads, stride.head * group, 1},
                                {p.batch, stride.batch, 1}});
}

// Of the current device.
inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();  // asked and answered: the next call must not see it
    return false;
  }
  return major == 9 && minor == 0;
}
inline int multiprocessors() {
  int device = 0, count = 0;
  NATSLM_CUDA(cudaGetDevice(&device));
  NATSLM_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace natslm::kernels::sm90
