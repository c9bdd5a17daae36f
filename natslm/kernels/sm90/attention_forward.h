// The Hopper forward kernel as its host code sees it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/sorted_keys.h"

namespace natslm::kernels::sm90 {

// All pointers are to device memory. "Place" is the index of a key in k and v: its place in the
// order, or its position where there is no order.
struct ForwardArguments {
  CUtensorMap q;     // axes D, head of a group, T, Hkv, B; box 64 x group x tile_queries
  CUtensorMap k, v;  // axes D, place, Hkv, B; box 64 x kTileKeys
  CUtensorMap k_piece, v_piece;  // the same arrays, box 64 x kPieceKeys

  const int32_t* position;   // [B, Hkv, T] by place; null: place = position
  const int32_t* last;       // [B, Hkv, T] by place
  const cuda::KeyRun* runs;  // [B, Hkv, tiles, KeyOrder::kSegments]; null: position order, and
  const int32_t* min_last;   // [B, Hkv, ceil(T / kBoundKeys)] of the lasts in a block of keys
  const int32_t* max_last;   // likewise
  const int32_t* lengths;    // [B] or null

  const int32_t* work;  // [work_items] (b * Hkv + h) * tiles + tile
  int32_t* next_item;   // 0 at the start: items taken beyond the first of each block
  int32_t work_items;

  __nv_bfloat16* out;  // [B, Hq, T, D]
  float* lse;          // [B, Hq, T]
  Strides out_stride;
  int32_t kv_heads, group, tokens, tiles, tile_queries;
  float scale;       // positive
  float scale_log2;  // scale * log2(e)
};

// Rows (a query of one head) that a block works on at a time; a query tile has as many positions as
// fit in with all heads of their group.
constexpr int32_t forward_rows(int32_t head_dim) {
  return head_dim == 64 ? 192 : 128;
}

// One block per multiprocessor, or per item where there are fewer. kHeadDim: 64 or 128.
template <int kHeadDim>
void launch_attention_forward(const ForwardArguments& arguments, int multiprocessors,
                              CUstream_st* stream);

// What each key received: mass[j] = sum over queries i and the group's heads of P_ij, from the lse
// of the forward pass. Deterministic.
struct MassArguments {
  const __nv_bfloat16* q;  // [B, Hq, T, D]
  const __nv_bfloat16* k;  // [B, Hkv, T, D] by place
  Strides q_stride, k_stride;
  const int32_t* position;  // [B, Hkv, T] by place; null: place = position
  const int32_t* last;      // [B, Hkv, T] by place
  const int32_t* lengths;   // [B] or null
  const float* lse;         // [B, Hq, T]
  float* mass;              // [B, Hkv, T] by position; 0 past a length
  int32_t batch, kv_heads, group, tokens, head_dim;
  float scale_log2;  // scale * log2(e)
};
void launch_attention_mass(const MassArguments& arguments, CUstream_st* stream);

}  // namespace natslm::kernels::sm90
