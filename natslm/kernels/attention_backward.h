// Gradients of attention_forward.h, and the sums from which roles learn.
//
// With P_ij the probabilities, dP_ij = dout_i . v_j and delta_i = dout_i . out_i:
//   dv_j = sum_i P_ij dout_i,  dS_ij = P_ij (dP_ij - delta_i),  dq_i = scale sum_j dS_ij k_j,
//   dk_j = scale sum_i dS_ij q_i                                      over visible pairs, and
//   g_ij = min(exp(s_ij - lse_i), 1) * (dP_ij - delta_i)              over ALL causal pairs j <= i,
//   role_sums[h][j] = sum of g_ij over j <= i <= min(horizons[h][j], length - 1),
// summed over the query heads of the group. (Deng & Lindauer 2025, with the visible normaliser
// limited to one; the kernel knows horizons, not what they mean.)
//
// Always deterministic: two runs agree bit for bit, whatever the number of workers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels {

// Three roles, and one more snapshot for the optional `end` term.
inline constexpr int kMaxHorizons = 4;

struct AttentionBackward {
  int32_t batch = 0, q_heads = 0, kv_heads = 0, tokens = 0, head_dim = 0;
  float scale = 1.0f;
  DType dtype = DType::kFloat32;  // of q, k, v, out, dout, dq, dk, dv

  const void* q = nullptr;     // [B, Hq, T, D]
  const void* k = nullptr;     // [B, Hkv, T, D]
  const void* v = nullptr;     // [B, Hkv, T, D]
  const void* out = nullptr;   // [B, Hq, T, D] as the forward pass wrote it
  const void* dout = nullptr;  // [B, Hq, T, D]
  Strides q_stride, k_stride, v_stride, out_stride, dout_stride;
  const float* lse = nullptr;     // [B, Hq, T] as the forward pass wrote it; -inf: no key was seen
  const int32_t* last = nullptr;  // [B, Hkv, T]
  const int32_t* lengths = nullptr;  // [B] or null: all T

  int32_t horizon_count = 0;  // 0: no role sums are wanted; at most kMaxHorizons
  const int32_t* horizons =
      nullptr;  // [horizon_count, B, Hkv, T]; a horizon before j gives a sum of 0
  const float* role_lse = nullptr;  // [B, Hq, T] normaliser of g instead of lse, or null (= lse)
  bool limit_factor = true;         // false: exp(s - lse) in g is not limited to one

  void* dq = nullptr;  // [B, Hq, T, D]; 0 past a length
  void* dk = nullptr;  // [B, Hkv, T, D]; likewise
  void* dv = nullptr;  // [B, Hkv, T, D]; likewise
  Strides dq_stride, dk_stride, dv_stride;
  float* role_sums = nullptr;  // [horizon_count, B, Hkv, T]; 0 past a length. A row whose query
                               // sees no key (lse = -inf) adds nothing
  ParallelFor parallel;        // CPU backends

  KeyOrder sorted;            // GPU backends, as in attention_forward.h
  void* workspace = nullptr;  // likewise
};

namespace reference {
std::string_view why_not(const AttentionBackward&);
void run(const AttentionBackward&);
}  // namespace reference

namespace cpu {
std::string_view why_not(const AttentionBackward&);
void run(const AttentionBackward&);
}  // namespace cpu

// As the GPU backends of attention_forward.h.
namespace cuda {
std::string_view why_not(const AttentionBackward&);
size_t workspace_bytes(const AttentionBackward&);
void run(const AttentionBackward&, CUstream_st* stream);
}  // namespace cuda

namespace sm90 {
std::string_view why_not(const AttentionBackward&);
size_t workspace_bytes(const AttentionBackward&);
void run(const AttentionBackward&, CUstream_st* stream);
}  // namespace sm90

namespace sm90_short {
std::string_view why_not(const AttentionBackward&);
size_t workspace_bytes(const AttentionBackward&);
void run(const AttentionBackward&, CUstream_st* stream);
}  // namespace sm90_short

}  // namespace natslm::kernels
