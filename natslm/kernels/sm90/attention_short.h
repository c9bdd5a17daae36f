// The Hopper kernels for short texts as their host code sees them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/sm90/short_texts.h"

namespace natslm::kernels::sm90 {

// All pointers are to device memory.
struct ShortArguments {
  const __nv_bfloat16 *q, *k, *v;  // [B, Hq or Hkv, T, D]
  Strides q_stride, k_stride, v_stride;
  const int32_t* last;     // [B, Hkv, T]
  const int32_t* lengths;  // [B] or null
  __nv_bfloat16* out;      // [B, Hq, T, D]
  Strides out_stride;
  int32_t batch, kv_heads, group, tokens;
  int32_t tile_queries, tiles;  // positions of a query tile; tiles of a head
  int32_t heads_together;       // whose blocks start together (short_grid)
  cuda::PackedRows packed;      // rows of a query tile
  uint32_t batch_factor;        // batch_factor_of(kv_heads)
  float scale;                  // positive
  float scale_log2;             // scale * log2(e)

  // Of head b * kv_heads + h: b.
  NATSLM_HD constexpr int32_t batch_of_head(int32_t head) const {
    return batch_of(static_cast<uint32_t>(head), batch_factor);
  }
};

// Rows (a query of one head) of a block.
constexpr int32_t short_rows(int32_t head_dim) {
  return head_dim == 64 ? 128 : 64;
}

struct ShortForwardArguments : ShortArguments {
  float* lse;  // [B, Hq, T]
};
template <int kHeadDim>
void launch_short_forward(const ShortForwardArguments& arguments, CUstream_st* stream);

// `out` is dq.
struct ShortQueryGradientArguments : ShortArguments {
  const __nv_bfloat16* dout;  // [B, Hq, T, D]
  Strides dout_stride;
  const float* terms;  // [B * Hq] rows of row_terms_stride(T)
};
// Behind the launch that writes the terms (cuda/dependent_launch.cuh).
template <int kHeadDim>
void launch_short_query_gradient(const ShortQueryGradientArguments& arguments, CUstream_st* stream);

}  // namespace natslm::kernels::sm90
