// What the portable kernels know about the keys of a call: where they are, and what was prepared on
// the device to read few of them (sorted_keys.h).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "natslm/base/dtype.h"
#include "natslm/kernels/cuda/sorted_keys.h"

namespace natslm::kernels::cuda {

// Bytes from token to token; why_not sees to it that they fit.
inline int32_t step_of(const Strides& stride) {
  return static_cast<int32_t>(stride.token * static_cast<int64_t>(sizeof(BFloat16)));
}

// Keys by place: in the order of a KeyOrder, or by position. Device memory.
struct KeySource {
  const BFloat16* k;  // [B, Hkv, T, D]
  const BFloat16* v;  // likewise
  Strides k_stride, v_stride;
  int32_t k_step, v_step;   // bytes from place to place
  const int32_t* last;      // [B, Hkv, T] by place
  const int32_t* position;  // [B, Hkv, T] of the key at a place; null: the place itself
  const int32_t* ends;      // [B, Hkv, kSegments] as in KeyOrder; null in position order
  const int32_t* lengths;   // [B] or null
  int32_t batch, kv_heads, tokens;
};

// Which of them a tile of tile_queries positions reads.
struct KeyPlan {
  KeySource keys;
  int32_t tile_queries, tiles;  // of one (sequence, KV head)
  const int32_t* work;          // [B * Hkv * tiles] tiles, the longest first
  const KeyRun* runs;           // sorted order, null otherwise
  const int32_t* min_last;      // position order, null otherwise
  const int32_t* max_last;      // likewise
};

template <class Params>
PlanShape plan_shape(const Params& p, int32_t tile_queries) {
  return {p.batch, p.kv_heads, p.tokens, p.head_dim, tile_queries};
}

template <class Params>
KeySource keys_by_position(const Params& p) {
  return {static_cast<const BFloat16*>(p.k),
          static_cast<const BFloat16*>(p.v),
          p.k_stride,
          p.v_stride,
          step_of(p.k_stride),
          step_of(p.v_stride),
          p.last,
          nullptr,
          nullptr,
          p.lengths,
          p.batch,
          p.kv_heads,
          p.tokens};
}

template <class Params>
size_t key_plan_bytes(const Params& p, int32_t tile_queries) {
  const PlanShape shape = plan_shape(p, tile_queries);
  return p.sorted.order ? sorted_keys_bytes(shape) : position_bounds_bytes(shape);
}

// Launches the preparation into p.workspace.
template <class Params>
KeyPlan prepare_keys(const Params& p, int32_t tile_queries, CUstream_st* stream) {
  const PlanShape shape = plan_shape(p, tile_queries);
  KeyPlan plan{
      keys_by_position(p), tile_queries, shape.tiles(), nullptr, nullptr, nullptr, nullptr};
  if (p.sorted.order) {
    const SortedKeys sorted = sorted_keys_in(p.workspace, shape);
    launch_sort_keys(shape, p.k, p.k_stride, p.v, p.v_stride, p.last, p.lengths, p.sorted, sorted,
                     stream);
    const Strides contiguous{int64_t{p.kv_heads} * p.tokens * p.head_dim,
                             int64_t{p.tokens} * p.head_dim, p.head_dim};
    plan.keys.k = static_cast<const BFloat16*>(sorted.k);
    plan.keys.v = static_cast<const BFloat16*>(sorted.v);
    plan.keys.k_stride = plan.keys.v_stride = contiguous;
    plan.keys.k_step = plan.keys.v_step = step_of(contiguous);
    plan.keys.last = sorted.last;
    plan.keys.position = sorted.position;
    plan.keys.ends = p.sorted.ends;
    plan.work = sorted.work;
    plan.runs = sorted.runs;
  } else {
    const PositionBounds bounds = position_bounds_in(p.workspace, shape);
    launch_position_bounds(shape, p.last, p.lengths, bounds, stream);
    plan.work = bounds.work;
    plan.min_last = bounds.min_last;
    plan.max_last = bounds.max_last;
  }
  return plan;
}

}  // namespace natslm::kernels::cuda
