// Attention over keys with lifetimes, all queries of a sequence at once (training, whole prompts).
//
//   out_i = sum over visible j of softmax_j(scale * q_i . k_j) v_j,   visible(i, j) as in
//   base/lifetime.h; the q_heads / kv_heads query heads of a group share a KV head and its
//   lifetimes.
//
// Work and time follow the visible pairs. Nothing of size T x T is ever stored.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
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

// An order of the keys in which what a tile of queries reads is a few contiguous runs (GPU only: a
// gather into this order is what turns sparsity into time; attention itself does not care about the
// order of keys). The keys of one (sequence, KV head) form three segments one after the other:
//   0, 1   positions ascend and `last` never falls;
//   2      positions ascend and last <= position + reach.
// roles/ builds it (what lives for ever | until an event | briefly); null: position order.
struct KeyOrder {
  static constexpr int kSegments = 3;
  const int32_t* order = nullptr;  // [B, Hkv, T]: position of the key at each place of the order; a
                                   // permutation of 0 .. length - 1, unspecified past the length
  const int32_t* ends = nullptr;   // [B, Hkv, kSegments]: one past the last place of each segment
  int32_t reach = 0;               // of segment 2, >= 0
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
  ParallelFor parallel;   // CPU backends

  // GPU backends: all pointers above are to device memory, and nothing waits for the device.
  KeyOrder sorted;            // optional
  void* workspace = nullptr;  // workspace_bytes(p) bytes, 256-byte aligned; contents do not matter
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

// The GPU backends take bfloat16, head sizes 64 and 128 (cuda: 256 too), groups of 1 to 8 query
// heads, rows that are 16-byte aligned. Two runs agree bit for bit. A build without CUDA has them
// too; why_not says so.
namespace cuda {  // mma.sync: compute capability 8.0 and up
std::string_view why_not(const AttentionForward&);
size_t workspace_bytes(const AttentionForward&);
void run(const AttentionForward&, CUstream_st* stream);
}  // namespace cuda

namespace sm90 {  // TMA and wgmma: compute capability 9.0
std::string_view why_not(const AttentionForward&);
size_t workspace_bytes(const AttentionForward&);
void run(const AttentionForward&, CUstream_st* stream);
}  // namespace sm90

namespace sm90_short {  // the same for up to 2,048 tokens: in position order, and fewer launches
std::string_view why_not(const AttentionForward&);
size_t workspace_bytes(const AttentionForward&);  // 0
void run(const AttentionForward&, CUstream_st* stream);
}  // namespace sm90_short

namespace sm90_whole {  // sm90 that reads every key up to the query, in one launch
std::string_view why_not(const AttentionForward&);
size_t workspace_bytes(const AttentionForward&);  // 0
void run(const AttentionForward&, CUstream_st* stream);
}  // namespace sm90_whole

}  // namespace natslm::kernels
