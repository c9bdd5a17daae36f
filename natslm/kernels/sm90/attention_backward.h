// The Hopper backward kernels as their host code sees them.
//
//   row terms        what the others need to know of a query: log-sum-exp and delta = dout . out
//   key gradient     dk, dv: a block owns keys and goes through the queries that read them
//   role sums        likewise, over all causal pairs; no gradient
//   query gradient   dq: a block owns queries and goes through the keys that they read
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/cuda/sorted_keys.h"
#include "natslm/kernels/sm90/attention_backward_tiles.h"
#include "natslm/kernels/sm90/attention_forward.h"

namespace natslm::kernels::sm90 {

// What a row of queries contributes to every exp2(octaves of s - lse) * (dout . v - delta), [2, T']
// with T' rounded up to 16 bytes: lse in octaves (log2(e) times the natural one), then delta. A
// query that sees no key, or is past its length, has lse = +inf and delta = 0, so that its factors
// are 0.
constexpr int64_t row_terms_stride(int32_t tokens) {
  return 2 * ((int64_t{tokens} + 3) / 4 * 4);
}

struct RowTermsArguments {
  const __nv_bfloat16 *out, *dout;  // [B, Hq, T, D]
  Strides out_stride, dout_stride;
  const float* lse;        // [B, Hq, T], natural
  const float* role_lse;   // likewise, or null
  const int32_t* lengths;  // [B] or null
  float* terms;            // [B * Hq] rows of row_terms_stride(T)
  float* role_terms;       // likewise, with role_lse; null where that is null
  int32_t* counters;       // [kCounters] are set to 0 for the launches that follow
  int32_t batch, q_heads, tokens, head_dim;
};
// Items that have been handed out, of each launch that hands out items.
enum Counter : int32_t { kKeyGradientItems, kRoleSumItems, kQueryGradientItems, kCounters };
// Behind the launch before it, if there is one (cuda/dependent_launch.cuh).
void launch_row_terms(const RowTermsArguments& arguments, bool behind, CUstream_st* stream);

// Of the key gradient and the role sums. "Place" as in ForwardArguments.
struct KeyParallelArguments {
  CUtensorMap q, dout;  // axes D, T, Hq, B; box 64 x kTileQueries
  CUtensorMap k, v;     // axes D, place, Hkv, B; box 64 x kWarpgroupKeys
  const float* terms;   // [B * Hq] rows of row_terms_stride(T)

  const int32_t* position;  // [B, Hkv, T] by place; null: place = position
  const int32_t* last;      // [B, Hkv, T] by place
  const int32_t* ends;      // [B, Hkv, KeyOrder::kSegments]; null: position order
  const int32_t* lengths;   // [B] or null
  int32_t batch, kv_heads, group, tokens;

  int32_t items, spans;    // spans of a head (cuda::key_span); items: of all heads
  int32_t heads_together;  // cuda::head_span
  int32_t* next_item;      // 0 at the start: items taken beyond the first of each block

  float scale, scale_log2;  // scale * log2(e)
  float limit;              // of exp(s - lse) in role sums: 1, or infinity
  int32_t horizon_count;    // 0: no role sums
  const int32_t* horizons;  // [horizon_count, B, Hkv, T] by position
  float* role_sums;         // likewise

  __nv_bfloat16 *dk, *dv;  // [B, Hkv, T, D] by position; not of the role sums
  Strides dk_stride, dv_stride;
};

// Keys that a block owns.
template <int kHeadDim>
int32_t keys_of_key_gradient();
template <int kHeadDim>
int32_t keys_of_role_sums();

// Whether the key gradient can bring the role sums along (horizon_count > 0, keys in position
// order). Head size 128 lacks some ten registers for it.
constexpr bool brings_role_sums(int32_t head_dim) {
  return head_dim == 64;
}

// One block per multiprocessor, or per item where there are fewer. kHeadDim: 64 or 128.
template <int kHeadDim>
void launch_key_gradient(const KeyParallelArguments& arguments, int multiprocessors,
                         CUstream_st* stream);
template <int kHeadDim>
void launch_role_sums(const KeyParallelArguments& arguments, int multiprocessors,
                      CUstream_st* stream);

// `out` with its stride is dq; lse is not used.
struct QueryGradientArguments : ForwardArguments {
  CUtensorMap dout;    // as q
  const float* terms;  // [B * Hq] rows of row_terms_stride(T)
};

// Rows of a block, as forward_rows.
inline constexpr int32_t kQueryGradientRows = 128;

template <int kHeadDim>
void launch_query_gradient(const QueryGradientArguments& arguments, int multiprocessors,
                           CUstream_st* stream);

}  // namespace natslm::kernels::sm90
