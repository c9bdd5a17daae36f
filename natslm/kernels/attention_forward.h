// Attention over keys with lifetimes, all queries of a sequence at once (training, whole prompts).
//
//   out_i = sum over visible j of softmax_j(scale * q_i . k_j) v_j,   visible(i, j) as in
//   base/lifetime.h; the q_heads / kv_heads query heads of a group share a KV head and its
//   lifetimes.
//
// Work and time follow the visible pairs. Nothing of size T x T is ever stored.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"
#include "natslm/base/parallel.h"

struct CUstream_st;

namespace natslm::kernels {

// Distance in elements between neighbours along each axis of a [B, H, T, D] array whose last axis
// is contiguous; lets [B, T, H, D] memory be used as it is.
struct Strides {
  int64_t batch = 0, head = 0, token = 0;
};

struct AttentionForward {
  int32_t batch = 0, q_heads = 0, kv_heads = 0, tokens = 0, head_dim = 0;  // B, Hq, Hkv, T, D
  float scale = 1.0f;             // multiplies q . k; finite
  DType dtype = DType::kFloat32;  // of q, k, v and out

  const void* q = nullptr;  // [B, Hq, T, D]
  const void* k = nullptr;  // [B, Hkv, T, D]
  const void* v = nullptr;  // [B, Hkv, T, D]
  Strides q_stride, k_stride, v_stride, out_stride;

  const int32_t* last = nullptr;  // [B, Hkv, T] contiguous, any values; last[j] < j: never read
  const int32_t* lengths =
      nullptr;  // [B] tokens in use, 0..T; null: all T. Rows past it are not read

  void* out = nullptr;    // [B, Hq, T, D]; 0 where a query sees no key, and past a length
  float* lse = nullptr;   // [B, Hq, T] contiguous, natural log of the sum; -inf there
  float* mass = nullptr;  // [B, Hkv, T] or null: sum over queries and the group's heads
                          // of the probability each key received; 0 past a length
  ParallelFor parallel;
};

// q.k and p.v multiply-adds count twice per pair: 4 * D FLOP for each visible pair and query head.
namespace reference {
std::string_view why_not(const AttentionForward&);  // "" means supported
void run(const AttentionForward&);                  // double precision, any strides
}  // namespace reference

namespace cpu {
std::string_view why_not(const AttentionForward&);
void run(const AttentionForward&);  // the result does not depend on the number of workers
}  // namespace cpu

}  // namespace natslm::kernels
