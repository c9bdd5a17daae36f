// What the host sides of the Hopper attention kernels share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <numbers>
#include <string_view>

#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/sorted_keys.h"
#include "natslm/kernels/sm90/attention_forward.h"
#include "natslm/kernels/sm90/attention_short.h"
#include "natslm/kernels/sm90/short_texts.h"
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

// Keys and values as the kernels read them, by place.
struct KeysByPlace {
  const void* k;
  const void* v;
  Strides k_stride, v_stride;
  const int32_t* position;  // null: place = position
  const int32_t* last;
  const int32_t* ends;  // of the segments; null: position order
};

template <class Params>
KeysByPlace keys_by_position(const Params& p) {
  return {p.k, p.v, p.k_stride, p.v_stride, nullptr, p.last, nullptr};
}

// Prepares the key plan in `plan` and names its parts in `to`.
template <class Params>
KeysByPlace prepare_keys(const Params& p, const cuda::PlanShape& shape, void* plan,
                         ForwardArguments& to, CUstream_st* stream) {
  if (p.sorted.order) {
    const cuda::SortedKeys sorted = cuda::sorted_keys_in(plan, shape);
    cuda::launch_sort_keys(shape, p.k, p.k_stride, p.v, p.v_stride, p.last, p.lengths, p.sorted,
                           sorted, stream);
    to.position = sorted.position;
    to.last = sorted.last;
    to.runs = sorted.runs;
    to.work = sorted.work;
    to.next_item = sorted.next_item;
    const int64_t head = int64_t{p.tokens} * p.head_dim;
    const Strides packed{head * p.kv_heads, head, p.head_dim};
    return {sorted.k, sorted.v, packed, packed, sorted.position, sorted.last, p.sorted.ends};
  }
  const cuda::PositionBounds bounds = cuda::position_bounds_in(plan, shape);
  cuda::launch_position_bounds(shape, p.last, p.lengths, bounds, stream);
  to.last = p.last;
  to.min_last = bounds.min_last;
  to.max_last = bounds.max_last;
  to.work = bounds.work;
  to.next_item = bounds.next_item;
  return keys_by_position(p);
}

// How many KV heads' blocks start at a time: so many that the arrays [T, D] they all read, two of
// each of `heads` heads in a sequence, share the L2 cache.
template <class Params>
int32_t heads_together(const Params& p, int32_t heads) {
  constexpr int64_t kCacheShare = 24 << 20;  // of the 50 MB
  const int64_t bytes = 2 * 2 * int64_t{heads / p.kv_heads} * p.tokens * p.head_dim;
  const int64_t all = int64_t{p.batch} * p.kv_heads, together = kCacheShare / bytes;
  return static_cast<int32_t>(together < 1 ? 1 : together > all ? all : together);
}

// "" if the kernels for short texts take what the others take.
template <class Params>
std::string_view why_not_short(const Params& p) {
  if (p.tokens > kShortTokens) return "texts of more than 2,048 tokens are not short";
  static_assert(kShortTokens == 2048);
  constexpr int64_t kMostStep = int64_t{1} << 30;  // elements: the bytes must fit 31 bits
  if (p.tokens > 1 && (p.k_stride.token >= kMostStep || p.v_stride.token >= kMostStep)) {
    return "keys of a head must be less than 2^30 elements apart";
  }
  if (int64_t{p.batch} * p.kv_heads * p.tokens > kMaxPosition ||
      int64_t{p.batch + 1} * p.kv_heads * p.kv_heads >= kMostHeadProducts / 2) {
    return "too many query tiles: batch * kv_heads * tokens is too large";
  }
  return "";
}

// All but the output and what a pass has of its own.
template <class Params>
ShortArguments short_arguments(const Params& p) {
  ShortArguments a{};
  a.q = static_cast<const __nv_bfloat16*>(p.q);
  a.k = static_cast<const __nv_bfloat16*>(p.k);
  a.v = static_cast<const __nv_bfloat16*>(p.v);
  a.q_stride = p.q_stride;
  a.k_stride = p.k_stride;
  a.v_stride = p.v_stride;
  a.last = p.last;
  a.lengths = p.lengths;
  a.batch = p.batch;
  a.kv_heads = p.kv_heads;
  a.group = group_of(p);
  a.tokens = p.tokens;
  a.tile_queries = short_rows(p.head_dim) / a.group;
  a.tiles = (p.tokens + a.tile_queries - 1) / a.tile_queries;
  constexpr int32_t kMostLayers = 65535;  // of a grid
  const int32_t heads = p.batch * p.kv_heads;
  a.heads_together =
      std::max(heads_together(p, p.kv_heads), (heads + kMostLayers - 1) / kMostLayers);
  a.packed = cuda::packed_rows(a.group);
  a.batch_factor = batch_factor_of(p.kv_heads);
  a.scale = p.scale;
  a.scale_log2 = p.scale * std::numbers::log2e_v<float>;
  return a;
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
