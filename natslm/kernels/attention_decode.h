// Attention of new queries over the live keys of a paged, ragged cache (decode, and the chunks of a
// prefill). Every KV head of every sequence has its own list of keys, in any order; a key carries
// its position and its `last`, and query i reads it if visible(i, position, last).
//
// The result for one sequence does not depend on the others in the batch, nor on the threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels {

// Keys a page holds. Page memory: the keys as [D, kPageKeys] (a vector of keys per channel, so that
// scores need no horizontal sums), then the values as [kPageKeys, D]; kPageKeys * D * 2 elements.
inline constexpr int32_t kPageKeys = 64;

// Bytes of one page.
constexpr int64_t page_bytes(int32_t head_dim, DType dtype) {
  return int64_t{2} * kPageKeys * head_dim * static_cast<int64_t>(size_of(dtype));
}

// The keys of one (sequence, KV head).
struct CachedKeys {
  const void* const* pages = nullptr;  // ceil(count / kPageKeys) pages, 64-byte aligned; what lies
                                       // past `count` in the last one is never used
  const int32_t* position = nullptr;   // [count]
  const int32_t* last = nullptr;       // [count]
  float* mass = nullptr;               // [count] or null: sum over these queries and the group's
                                       // heads of the probability that each key received
  int32_t count = 0;
};

struct AttentionDecode {
  int32_t batch = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
  int32_t rows = 0;  // queries of all sequences together
  float scale = 1.0f;
  DType dtype = DType::kFloat32;  // of q, the pages and out

  const int32_t* row_start = nullptr;     // [B + 1]: sequence b owns rows row_start[b] .. [b + 1]
  const int32_t* row_position = nullptr;  // [rows], ascending inside a sequence
  const void* q = nullptr;                // [rows, Hq, D] contiguous
  const CachedKeys* keys = nullptr;       // [B, Hkv]
  void* out = nullptr;                    // [rows, Hq, D] contiguous; 0 where nothing is visible
  float* lse = nullptr;                   // [rows, Hq] or null; -inf there
  ParallelFor parallel;
};

namespace reference {
std::string_view why_not(const AttentionDecode&);
void run(const AttentionDecode&);  // double precision, any head size
}  // namespace reference

namespace cpu {
std::string_view why_not(const AttentionDecode&);
void run(const AttentionDecode&);
}  // namespace cpu

}  // namespace natslm::kernels
