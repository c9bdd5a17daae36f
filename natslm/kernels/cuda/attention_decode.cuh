// What the GPU decode kernels share: the walk over a list's pieces, the arithmetic of one warp on a
// page in shared memory, and how results leave. A kernel adds how pages come into shared memory.
//
// A warp holds 16 packed rows as the 16 rows of mma.m16n8k16 and takes keys as its columns. Scores
// are kept in the units of exp2: s = q . k * scale * log2(e).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/kernels/cuda/decode_plan.h"

namespace natslm::kernels::cuda {

inline constexpr int kComputeWarps = 4;
inline constexpr int kWarp = 32;
inline constexpr int32_t kMaxLists = 1024;  // of one launch: the prefix sums lie in shared memory
inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kLog2e = 1.442695040888963407f;

// A launch: some sequences of an AttentionDecode, and its workspace.
struct DecodeLaunch {
  const CachedKeys* keys;       // [lists]
  const int32_t* row_start;     // [lists / kv_heads + 1]
  const int32_t* row_position;  // [rows of the whole batch]
  const __nv_bfloat16* q;       // [rows, q_heads, D]
  __nv_bfloat16* out;           // likewise
  float* lse;                   // [rows, q_heads] or null
  float2* row_stats;            // [rows, q_heads] or null, as part_stats but over all keys
  int32_t lists, kv_heads, q_heads, group;
  float scale_log2;     // scale * log2(e)
  bool few_rows;        // no sequence has more than kFewRows packed rows: a page is read once
  int32_t* part_start;  // [lists]: first partial row of each list
  float2* part_stats;   // [partial rows]: highest score and sum of exp2(score - highest)
  float* part_out;      // [partial rows, D]: sum of exp2(score - highest) * value
};

// The launches that do p, one after the other, over one workspace; mostly one.
struct DecodePart {
  DecodeLaunch launch;
  int32_t first_row, rows;  // of the batch
  int64_t most_items;       // whatever the counts are
  bool may_be_cut;          // whether any list may have more than one piece
};
std::vector<DecodePart> decode_parts(const AttentionDecode& p);
size_t decode_workspace_bytes(const AttentionDecode& p);
// "" if these kernels take p's sizes and type.
std::string_view why_not_gpu(const AttentionDecode& p);

// Puts the pieces together: out and lse of every row whose list was cut. `overlap`: it may be
// launched while the kernel ahead of it still runs (it waits for that one's end itself).
void launch_combine(const DecodePart& part, int32_t head_dim, bool overlap, CUstream_st* stream);
// Fills the mass of every list that has one, from row_stats.
void launch_mass(const DecodePart& part, int32_t head_dim, int32_t max_count, CUstream_st* stream);

// --- one instruction, one function ---

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// c[16 x 8] += a[16 x 16] b[16 x 8], bf16 in, float out.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
// The same in all lanes, and known to be so by the compiler.
__device__ inline int warp_id() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
}

// --- the work ---

// Where the items of each list begin, in shared memory.
struct ItemTable {
  int32_t start[kMaxLists + 1];
  int32_t part_start[kMaxLists];
  int32_t warp_items[kWarp], warp_parts[kWarp];
};

__device__ inline int32_t packed_rows_of(const DecodeLaunch& l, int32_t list) {
  const int32_t b = list / l.kv_heads;
  return (l.row_start[b + 1] - l.row_start[b]) * l.group;
}

// Fills the table; all `threads` of the block take part. Ends with a barrier.
template <int kThreads>
__device__ void fill_items(const DecodeLaunch& l, ItemTable& table) {
  constexpr int kWarps = kThreads / kWarp, kEach = (kMaxLists + kThreads - 1) / kThreads;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  // As few lists per thread as it takes: mostly one, so that their loads go out together.
  const int each = (l.lists + kThreads - 1) / kThreads;
  const int first = static_cast<int>(threadIdx.x) * each;
  int32_t items = 0, parts = 0;
  for (int i = 0; i < kEach && i < each; ++i) {
    if (first + i >= l.lists) break;
    const int32_t rows = packed_rows_of(l, first + i);
    const ListCut cut = cut_list(rows, l.keys[first + i].count);
    items += cut.items();
    parts += partial_rows(rows, cut);
  }
  int32_t items_to = items, parts_to = parts;  // inclusive sums over the warp
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t i = __shfl_up_sync(~0u, items_to, step), p = __shfl_up_sync(~0u, parts_to, step);
    if (lane >= step) {
      items_to += i;
      parts_to += p;
    }
  }
  if (lane == kWarp - 1) {
    table.warp_items[warp] = items_to;
    table.warp_parts[warp] = parts_to;
  }
  __syncthreads();
  int32_t item = items_to - items, part = parts_to - parts;
  for (int w = 0; w < kWarps; ++w) {
    if (w >= warp) break;
    item += table.warp_items[w];
    part += table.warp_parts[w];
  }
  for (int i = 0; i < kEach && i < each; ++i) {
    if (first + i >= l.lists) break;
    table.start[first + i] = item;
    table.part_start[first + i] = part;
    const int32_t rows = packed_rows_of(l, first + i);
    const ListCut cut = cut_list(rows, l.keys[first + i].count);
    item += cut.items();
    part += partial_rows(rows, cut);
    if (first + i == l.lists - 1) table.start[l.lists] = item;
  }
  __syncthreads();
}

// One tile of packed rows against one piece of a list's keys.
inline constexpr int32_t kNoList = -1;
struct Item {
  int32_t list, count;       // of keys in the list
  int32_t part_start;        // first partial row of the list
  int32_t row_start;         // the sequence's first row
  int32_t packed_rows;       // of the sequence
  int32_t first_row;         // packed row at which the tile begins
  int32_t piece, pieces;     // of the list
  int32_t page, page_end;    // [page, page_end) of the list's pages
  const void* const* pages;  // of the list
  const int32_t* last;       // in place of the pages', or null
  __device__ bool few() const { return packed_rows <= kFewRows; }
};

// Item `within` of those of list `list`.
__device__ inline Item item_of(const DecodeLaunch& l, int32_t list, int32_t part_start,
                               const CachedKeys& keys, int32_t row_start, int32_t packed_rows,
                               int32_t within) {
  Item item;
  item.list = list;
  item.part_start = part_start;
  item.pages = keys.pages;
  item.last = keys.last;
  item.count = keys.count;
  item.row_start = row_start;
  item.packed_rows = packed_rows;
  const ListCut cut = cut_list(packed_rows, item.count);
  // Tiles of a piece are neighbours: they read the same pages at about the same time.
  item.piece = item.few() ? within : within / cut.tiles;
  item.pieces = cut.pieces;
  item.first_row = item.few() ? 0 : within % cut.tiles * kManyRows;
  item.page = item.piece * cut.piece_pages;
  const int32_t end = item.page + cut.piece_pages, pages = pages_of(item.count);
  item.page_end = end < pages ? end : pages;
  return item;
}

__device__ inline Item item_at(const DecodeLaunch& l, const ItemTable& table, int32_t index) {
  int32_t low = 0, high = l.lists;  // start[low] <= index < start[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (table.start[middle] <= index ? low : high) = middle;
  }
  return item_of(l, low, table.part_start[low], l.keys[low], l.row_start[low / l.kv_heads],
                 packed_rows_of(l, low), index - table.start[low]);
}

// The same in the registers of one warp, for no more lists than it has lanes: one load of each list
// and nothing to wait for but that. Whole warps call all of it.
struct WarpItems {
  CachedKeys keys;
  int32_t row_start = 0, packed_rows = 0;
  int32_t start = 0, part_start = 0;  // as in ItemTable
  int32_t items = 0;                  // of all lists

  __device__ explicit WarpItems(const DecodeLaunch& l) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int32_t parts = 0;
    if (lane < l.lists) {
      keys = l.keys[lane];
      const int32_t b = lane / l.kv_heads;
      row_start = l.row_start[b];
      packed_rows = (l.row_start[b + 1] - row_start) * l.group;
      const ListCut cut = cut_list(packed_rows, keys.count);
      items = cut.items();
      parts = partial_rows(packed_rows, cut);
    }
    int32_t items_to = items, parts_to = parts;  // inclusive sums
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t i = __shfl_up_sync(~0u, items_to, step);
      const int32_t p = __shfl_up_sync(~0u, parts_to, step);
      if (lane >= step) {
        items_to += i;
        parts_to += p;
      }
    }
    start = items_to - items;
    part_start = parts_to - parts;
    items = __shfl_sync(~0u, items_to, kWarp - 1);
  }

  // index < items
  __device__ Item at(const DecodeLaunch& l, int32_t index) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    // The last list that begins at or before the item: those without items begin where the next
    // does.
    const unsigned before = __ballot_sync(~0u, lane < l.lists && start <= index);
    const int list = kWarp - 1 - __clz(static_cast<int>(before));
    const auto of_list = [&](auto x) { return __shfl_sync(~0u, x, list); };
    CachedKeys its;
    its.pages = reinterpret_cast<const void* const*>(
        of_list(reinterpret_cast<unsigned long long>(keys.pages)));
    its.last =
        reinterpret_cast<const int32_t*>(of_list(reinterpret_cast<unsigned long long>(keys.last)));
    its.count = of_list(keys.count);
    return item_of(l, list, of_list(part_start), its, of_list(row_start), of_list(packed_rows),
                   index - of_list(start));
  }
};

// Element offset of a packed row's vector in q and out; the same / D in lse.
__device__ inline int64_t vector_of(const DecodeLaunch& l, const Item& item, int32_t packed) {
  const int64_t row = item.row_start + packed / l.group;
  return row * l.q_heads + item.list % l.kv_heads * l.group + packed % l.group;
}

// A page in shared memory.
template <int kHeadDim>
struct alignas(128) SharedPage {
  static constexpr GpuPage kLayout{kHeadDim};
  static constexpr int kBytes = static_cast<int>(kLayout.bytes());
  uint8_t bytes[kBytes];

  __device__ const int32_t* position() const {
    return reinterpret_cast<const int32_t*>(bytes + kLayout.position());
  }
  __device__ const int32_t* last() const {
    return reinterpret_cast<const int32_t*>(bytes + kLayout.last());
  }
};

// What a warp knows of its 16 packed rows. A thread holds, as mma lays them out, rows lane / 4 and
// lane / 4 + 8; rows past the last one repeat it, and are not written out.
template <int kHeadDim>
struct WarpRows {
  static constexpr int kSteps = kHeadDim / 16, kChannelTiles = kHeadDim / 8;
  uint32_t q[kSteps][4];
  int32_t position[2];
  float highest[2], total[2];
  float out[kChannelTiles][4];

  // `first`: packed row of the warp's row 0. False if the warp has no row at all.
  __device__ bool load(const DecodeLaunch& l, const Item& item, int32_t first) {
    if (first >= item.packed_rows) return false;
    const int lane = lane_id();
    for (int half = 0; half < 2; ++half) {
      const int32_t wanted = first + lane / 4 + 8 * half;
      const int32_t row = wanted < item.packed_rows ? wanted : item.packed_rows - 1;
      position[half] = l.row_position[item.row_start + row / l.group];
      highest[half] = -INFINITY;
      total[half] = 0.0f;
      const uint32_t* from = reinterpret_cast<const uint32_t*>(
          l.q + vector_of(l, item, row) * kHeadDim + 2 * (lane % 4));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        q[step][half] = from[step * 8];
        q[step][half + 2] = from[step * 8 + 4];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kChannelTiles; ++tile) {
      for (float& x : out[tile]) x = 0.0f;
    }
    return true;
  }
};

// The rows against `16 * kBlocks` keys of a page, from `key` on; `valid` of the page's keys exist.
template <int kHeadDim, int kBlocks>
__device__ void attend_keys(const SharedPage<kHeadDim>& page, int32_t key, int32_t valid,
                            const int32_t* last, float scale_log2, WarpRows<kHeadDim>& rows) {
  constexpr int kTiles = 2 * kBlocks;
  const int lane = lane_id(), quad = lane % 4;
  // Key of a score: key + 8 * tile + 2 * quad + element. Which of this thread's scores are of
  // visible pairs: bit 4 * tile + 2 * half + element.
  uint32_t seen = 0;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int32_t at = key + 8 * tile + 2 * quad;
    const int2 position = *reinterpret_cast<const int2*>(page.position() + at);
    int2 end;
    if (last == nullptr) {
      end = *reinterpret_cast<const int2*>(page.last() + at);
    } else {
      end.x = at < valid ? last[at] : -1;
      end.y = at + 1 < valid ? last[at + 1] : -1;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t i = rows.position[half];
      seen |= uint32_t{at < valid && visible(i, position.x, end.x)} << (4 * tile + 2 * half);
      seen |= uint32_t{at + 1 < valid && visible(i, position.y, end.y)}
              << (4 * tile + 2 * half + 1);
    }
  }
  constexpr uint32_t kAll = (1u << (4 * kTiles)) - 1;
  static_assert(kTiles < 8);
  if (!__any_sync(~0u, seen != 0)) return;
  const bool masked = !__all_sync(~0u, seen == kAll);

  float score[kTiles][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    for (float& x : score[tile]) x = 0.0f;
  }
  const uint32_t base = shared_address(page.bytes);
  {
    // Matrices of one load: (keys 0-7, channels 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
    const int row = lane % 8 + lane / 16 * 8, piece = lane / 8 % 2;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint32_t address = base + (key + 16 * block + row) * (2 * kHeadDim);
#pragma unroll
      for (int step = 0; step < WarpRows<kHeadDim>::kSteps; ++step) {
        uint32_t b[4];
        load_matrices(b, address + (((2 * step + piece) ^ (row % 8)) << 4));
        multiply_add(score[2 * block], rows.q[step], b[0], b[1]);
        multiply_add(score[2 * block + 1], rows.q[step], b[2], b[3]);
      }
    }
  }

  float highest[2] = {rows.highest[0], rows.highest[1]};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float s = score[tile][e] * scale_log2;
      score[tile][e] = seen >> (4 * tile + e) & 1 ? s : -INFINITY;
      highest[e / 2] = fmaxf(highest[e / 2], score[tile][e]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 1));
    highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 2));
  }
  // A row that has seen nothing yet has no highest score; 0 in its place keeps infinities apart.
  float from[2], shrink[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    from[half] = highest[half] == -INFINITY ? 0.0f : highest[half];
    shrink[half] = exp2_fast(rows.highest[half] - from[half]);
    rows.highest[half] = highest[half];
    rows.total[half] *= shrink[half];
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[tile][e] = exp2_fast(score[tile][e] - from[e / 2]);
      rows.total[e / 2] += score[tile][e];
    }
  }
#pragma unroll
  for (int tile = 0; tile < WarpRows<kHeadDim>::kChannelTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) rows.out[tile][e] *= shrink[e / 2];
  }

  // Matrices of one load: (keys 0-7, channels 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  const int row = lane % 16, piece = lane / 16;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const uint32_t p[4] = {pack(score[2 * block][0], score[2 * block][1]),
                           pack(score[2 * block][2], score[2 * block][3]),
                           pack(score[2 * block + 1][0], score[2 * block + 1][1]),
                           pack(score[2 * block + 1][2], score[2 * block + 1][3])};
    // Zero times what no row sees must be zero, whatever it is: its values are blanked. A key's
    // bits are spread over the 8 lanes with its quad.
    uint32_t keep[2] = {~0u, ~0u};
    if (masked) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t bits = seen >> (4 * (2 * block + tile));
        const uint32_t lanes = 0x11111111u << quad;
        const uint32_t even = __ballot_sync(~0u, bits & 0b0101) & lanes;
        const uint32_t odd = __ballot_sync(~0u, bits & 0b1010) & lanes;
        keep[tile] = (even ? 0x0000ffffu : 0) | (odd ? 0xffff0000u : 0);
      }
    }
    const uint32_t address = base + static_cast<uint32_t>(SharedPage<kHeadDim>::kLayout.values()) +
                             (key + 16 * block + row) * (2 * kHeadDim);
#pragma unroll
    for (int tile = 0; tile < WarpRows<kHeadDim>::kChannelTiles; tile += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, address + (((tile + piece) ^ (row % 8)) << 4));
      multiply_add(rows.out[tile], p, b[0] & keep[0], b[1] & keep[1]);
      multiply_add(rows.out[tile + 1], p, b[2] & keep[0], b[3] & keep[1]);
    }
  }
}

// The warp's part of a page: 16 of its keys for few rows, all of them for many.
template <int kHeadDim>
__device__ inline void attend_page(const SharedPage<kHeadDim>& page, const Item& item,
                                   int32_t page_number, float scale_log2, int warp,
                                   WarpRows<kHeadDim>& rows) {
  const int32_t before = page_number * kPageKeys, valid = item.count - before;
  const int32_t* last = item.last == nullptr ? nullptr : item.last + before;
  if (item.few()) {
    attend_keys<kHeadDim, 1>(page, 16 * warp, valid, last, scale_log2, rows);
  } else {
    // Half a page at a time, of large heads a quarter: the scores of all 64 keys would not leave
    // enough registers for two blocks on a multiprocessor.
    constexpr int kBlocks = kHeadDim <= 128 ? 2 : 1;
#pragma unroll 1
    for (int32_t key = 0; key < kPageKeys; key += 16 * kBlocks) {
      attend_keys<kHeadDim, kBlocks>(page, key, valid, last, scale_log2, rows);
    }
  }
}

template <int kHeadDim>
__device__ inline void finish_totals(WarpRows<kHeadDim>& rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.total[half] += __shfl_xor_sync(~0u, rows.total[half], 1);
    rows.total[half] += __shfl_xor_sync(~0u, rows.total[half], 2);
  }
}

// Natural log of the sum of exp(scores).
__device__ inline float log_sum(float highest, float total) {
  // Nothing seen: log(0). A total that is NaN stays one.
  return highest == -INFINITY && total == 0.0f ? -INFINITY : highest * kLn2 + logf(total);
}

// Of a row of q: over all of its keys.
__device__ inline void store_row_stats(const DecodeLaunch& l, int64_t vector, float highest,
                                       float total) {
  if (l.lse != nullptr) l.lse[vector] = log_sum(highest, total);
  if (l.row_stats != nullptr) l.row_stats[vector] = make_float2(highest, total);
}

// Where a warp's few rows meet those of the other warps.
template <int kHeadDim>
struct MergeBuffer {
  float2 stats[kComputeWarps][kFewRows];
  float out[kComputeWarps][8][kHeadDim + 8];  // half the rows at a time; 8: other banks
};

// Where a packed row's results go: to the output if its list is one piece, else to the partial
// results.
template <int kHeadDim>
struct RowTarget {
  int64_t vector, part;  // part is -1 where there is no need for one

  __device__ RowTarget(const DecodeLaunch& l, const Item& item, int32_t packed)
      : vector(vector_of(l, item, packed)),
        part(item.pieces > 1
                 ? int64_t{item.part_start} + int64_t{item.piece} * item.packed_rows + packed
                 : -1) {}

  __device__ void store_stats(const DecodeLaunch& l, float highest, float total) const {
    if (part >= 0) {
      l.part_stats[part] = make_float2(highest, total);
    } else {
      store_row_stats(l, vector, highest, total);
    }
  }
  // Two channels, not divided by the total yet; `factor` is its inverse.
  __device__ void store_channels(const DecodeLaunch& l, int32_t channel, float2 value,
                                 float factor) const {
    if (part >= 0) {
      *reinterpret_cast<float2*>(l.part_out + part * kHeadDim + channel) = value;
    } else {
      *reinterpret_cast<uint32_t*>(l.out + vector * kHeadDim + channel) =
          pack(value.x * factor, value.y * factor);
    }
  }
};

__device__ inline float inverse_of(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;  // 0: a row that sees nothing
}

// Many rows: each warp has all keys of its own 16.
template <int kHeadDim>
__device__ void store_many(const DecodeLaunch& l, const Item& item, int32_t first,
                           WarpRows<kHeadDim>& rows) {
  finish_totals(rows);
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t packed = first + lane / 4 + 8 * half;
    if (packed >= item.packed_rows) continue;
    const RowTarget<kHeadDim> target(l, item, packed);
    const float factor = inverse_of(rows.total[half]);
    if (lane % 4 == 0) target.store_stats(l, rows.highest[half], rows.total[half]);
#pragma unroll
    for (int tile = 0; tile < WarpRows<kHeadDim>::kChannelTiles; ++tile) {
      target.store_channels(l, 8 * tile + 2 * (lane % 4),
                            {rows.out[tile][2 * half], rows.out[tile][2 * half + 1]}, factor);
    }
  }
}

// Few rows: the four warps hold different keys of the same rows; their parts are added in the order
// of the warps. `barrier` lets the computing warps wait for each other.
template <int kHeadDim, class Barrier>
__device__ void store_few(const DecodeLaunch& l, const Item& item, int warp,
                          WarpRows<kHeadDim>& rows, MergeBuffer<kHeadDim>& buffer,
                          const Barrier& barrier) {
  finish_totals(rows);
  const int lane = lane_id();
  if (lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      buffer.stats[warp][lane / 4 + 8 * half] = {rows.highest[half], rows.total[half]};
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half >= item.packed_rows) break;
#pragma unroll
    for (int tile = 0; tile < WarpRows<kHeadDim>::kChannelTiles; ++tile) {
      *reinterpret_cast<float2*>(&buffer.out[warp][lane / 4][8 * tile + 2 * (lane % 4)]) = {
          rows.out[tile][2 * half], rows.out[tile][2 * half + 1]};
    }
    barrier();
    constexpr int kPairs = kHeadDim / 2;  // of channels
    for (int at = warp * kWarp + lane; at < 8 * kPairs; at += kComputeWarps * kWarp) {
      const int32_t packed = at / kPairs + 8 * half, channel = at % kPairs * 2;
      if (packed >= item.packed_rows) break;
      float highest = -INFINITY, total = 0.0f;
      for (int w = 0; w < kComputeWarps; ++w) {
        highest = fmaxf(highest, buffer.stats[w][packed].x);
      }
      const float from = highest == -INFINITY ? 0.0f : highest;
      float2 sum = {0.0f, 0.0f};
      for (int w = 0; w < kComputeWarps; ++w) {
        const float2 stats = buffer.stats[w][packed];
        const float weight = exp2_fast(stats.x - from);
        const float2 part = *reinterpret_cast<const float2*>(&buffer.out[w][packed % 8][channel]);
        total += weight * stats.y;
        sum.x += weight * part.x;
        sum.y += weight * part.y;
      }
      const RowTarget<kHeadDim> target(l, item, packed);
      if (channel == 0) target.store_stats(l, highest, total);
      target.store_channels(l, channel, sum, inverse_of(total));
    }
    barrier();  // before the buffer is filled again
  }
}

}  // namespace natslm::kernels::cuda
