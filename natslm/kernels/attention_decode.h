// Attention of new queries over the live keys of a paged, ragged cache (decode, and the chunks of a
// prefill). Every KV head of every sequence has its own list of keys, in any order; a key carries
// its position and its `last`, and query i reads it if visible(i, position, last).
//
// The result for one sequence does not depend on the others in the batch, nor on the threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels {

// Keys a page holds. Page memory on the CPU: the keys as [D, kPageKeys] (a vector of keys per
// channel, so that scores need no horizontal sums), then the values as [kPageKeys, D];
// kPageKeys * D * 2 elements.
inline constexpr int32_t kPageKeys = 64;

// Bytes of the keys and values of one page, on any device.
constexpr int64_t page_bytes(int32_t head_dim, DType dtype) {
  return int64_t{2} * kPageKeys * head_dim * static_cast<int64_t>(size_of(dtype));
}

// Page memory on a GPU, bfloat16: the keys as [kPageKeys, D], the values as [kPageKeys, D], then
// position [kPageKeys] and last [kPageKeys] as int32, so that one copy brings all that attention
// needs. The 16-byte pieces of a row of keys or values are permuted: piece c of row s lies at place
// c ^ (s % 8), which makes the matrix loads of 8 rows free of bank conflicts wherever the page is
// copied to.
struct GpuPage {
  static constexpr int32_t kPieceElements = 8;  // of 16 bytes
  static constexpr int64_t kMetadataBytes = int64_t{2} * kPageKeys * sizeof(int32_t);
  int32_t head_dim;  // a multiple of 64

  // Where channel `channel` of row `slot` lies among the elements of the keys, or of the values.
  NATSLM_HD constexpr int32_t element(int32_t slot, int32_t channel) const {
    return slot * head_dim + ((channel / kPieceElements) ^ (slot % 8)) * kPieceElements +
           channel % kPieceElements;
  }
  // In bytes from the start of a page.
  NATSLM_HD constexpr int64_t values() const { return int64_t{2} * kPageKeys * head_dim; }
  NATSLM_HD constexpr int64_t position() const { return 2 * values(); }
  NATSLM_HD constexpr int64_t last() const {
    return position() + int64_t{kPageKeys} * int64_t{sizeof(int32_t)};
  }
  NATSLM_HD constexpr int64_t bytes() const { return position() + kMetadataBytes; }
};

// The keys of one (sequence, KV head). For a GPU it lies in device memory, as do the arrays it
// points to: `position` is not used (it is in the pages) and `last`, unless null, is used in place
// of what is in the pages.
struct CachedKeys {
  const void* const* pages = nullptr;  // ceil(count / kPageKeys) pages, 64-byte aligned (GPU: 16);
                                       // what lies past `count` in the last one is never used
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
  ParallelFor parallel;                   // CPU backends

  // GPU backends: all arrays but row_start are in device memory and nothing waits for the device.
  // Only what is here decides what is launched; positions, counts, pages and lifetimes are read
  // when it runs, so a captured launch may be replayed after they changed.
  const int32_t* device_row_start = nullptr;  // [B + 1]: the same as row_start
  int32_t max_count = 0;      // no list has more keys: bounds the launches and the workspace
  bool mass = false;          // whether any list has a `mass`
  void* workspace = nullptr;  // workspace_bytes(p) bytes, 256-byte aligned; contents do not matter
};

namespace reference {
std::string_view why_not(const AttentionDecode&);
void run(const AttentionDecode&);  // double precision, any head size
}  // namespace reference

namespace cpu {
std::string_view why_not(const AttentionDecode&);
void run(const AttentionDecode&);
}  // namespace cpu

// The GPU backends take bfloat16, head sizes 64 and 128 (cuda: 256 too) and groups of 1 to 8 query
// heads. Two runs agree bit for bit. Where some of 16 neighbouring packed rows (position-major,
// then the group's heads) see a key and others do not, its value must be finite; a key that none of
// them sees may hold anything. A build without CUDA has them too; why_not says so.
namespace cuda {  // mma.sync and cp.async: compute capability 8.0 and up
std::string_view why_not(const AttentionDecode&);
size_t workspace_bytes(const AttentionDecode&);
void run(const AttentionDecode&, CUstream_st* stream);
}  // namespace cuda

namespace sm90 {  // bulk copies of whole pages: compute capability 9.0 and up
std::string_view why_not(const AttentionDecode&);
size_t workspace_bytes(const AttentionDecode&);
void run(const AttentionDecode&, CUstream_st* stream);
}  // namespace sm90

}  // namespace natslm::kernels
