// Attention over cached pages for compute capability 8.0 and up, and the passes that every GPU
// backend shares: putting pieces together, and the mass that each key received.
//
// A block takes items (a tile of rows against a piece of a list) in turn and copies one page ahead
// of the one it works on. What bounds it is reading the pages once: see docs/kernels.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <type_traits>

#include "natslm/kernels/cuda/attention_decode.cuh"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/dependent_launch.cuh"
#include "natslm/kernels/decode_checks.h"
#include "natslm/kernels/gpu_head_dim.h"

namespace natslm::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;

constexpr size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int32_t packed_rows(const AttentionDecode& p, int32_t b) {
  return (p.row_start[b + 1] - p.row_start[b]) * (p.q_heads / p.kv_heads);
}

int32_t sequences_per_launch(const AttentionDecode& p) {
  return std::max(1, kMaxLists / p.kv_heads);
}

// Where the arrays of the workspace begin. Launches follow each other and share all but row_stats.
struct Workspace {
  size_t part_start = 0, part_stats = 0, part_out = 0, row_stats = 0, bytes = 0;
};

Workspace workspace_of(const AttentionDecode& p) {
  int64_t most = 0;
  const int32_t step = sequences_per_launch(p);
  for (int32_t begin = 0; begin < p.batch; begin += step) {
    int64_t rows = 0;
    for (int32_t b = begin; b < std::min(begin + step, p.batch); ++b) {
      rows += p.kv_heads * max_partial_rows(packed_rows(p, b), p.max_count);
    }
    most = std::max(most, rows);
  }
  Workspace w;
  w.part_stats = aligned(sizeof(int32_t) * std::min(step, p.batch) * p.kv_heads);
  w.part_out = aligned(w.part_stats + sizeof(float2) * most);
  w.row_stats = aligned(w.part_out + sizeof(float) * most * p.head_dim);
  w.bytes = w.row_stats;
  if (p.mass) w.bytes += sizeof(float2) * int64_t{p.rows} * p.q_heads;
  return w;
}

}  // namespace

std::string_view why_not_gpu(const AttentionDecode& p) {
  if (const std::string_view why = why_not_decode_shapes(p); !why.empty()) return why;
  if (p.dtype != DType::kBFloat16) return "on a GPU the cached keys must be bfloat16";
  if (!is_gpu_head_dim(p.head_dim)) return "on a GPU head_dim must be 64, 128 or 256";
  if (p.q_heads / p.kv_heads > 8) return "on a GPU at most 8 query heads may share a KV head";
  if (p.kv_heads > kMaxLists) return "on a GPU there may be at most 1024 KV heads";
  if (p.max_count < 0) return "max_count must not be negative";
  return "";
}

size_t decode_workspace_bytes(const AttentionDecode& p) {
  return p.batch > 0 ? workspace_of(p).bytes : 0;
}

std::vector<DecodePart> decode_parts(const AttentionDecode& p) {
  std::vector<DecodePart> parts;
  if (p.batch == 0) return parts;
  const Workspace w = workspace_of(p);
  auto* memory = static_cast<uint8_t*>(p.workspace);
  const int32_t step = sequences_per_launch(p);
  for (int32_t begin = 0; begin < p.batch; begin += step) {
    const int32_t end = std::min(begin + step, p.batch);
    DecodePart part{};
    part.first_row = p.row_start[begin];
    part.rows = p.row_start[end] - part.first_row;
    part.launch.few_rows = true;
    if (part.rows == 0 && !p.mass) continue;
    for (int32_t b = begin; b < end; ++b) {
      const int32_t rows = packed_rows(p, b);
      const int32_t pieces = max_pieces(rows, p.max_count);
      part.most_items += int64_t{p.kv_heads} * cut_list(rows, 0).tiles * pieces;
      part.may_be_cut |= pieces > 1;
      part.launch.few_rows &= rows <= kFewRows;
    }
    DecodeLaunch& l = part.launch;
    l.keys = p.keys + int64_t{begin} * p.kv_heads;
    l.row_start = p.device_row_start + begin;
    l.row_position = p.row_position;
    l.q = static_cast<const __nv_bfloat16*>(p.q);
    l.out = static_cast<__nv_bfloat16*>(p.out);
    l.lse = p.lse;
    if (p.mass) l.row_stats = reinterpret_cast<float2*>(memory + w.row_stats);
    l.lists = (end - begin) * p.kv_heads;
    l.kv_heads = p.kv_heads;
    l.q_heads = p.q_heads;
    l.group = p.q_heads / p.kv_heads;
    l.scale_log2 = p.scale * kLog2e;
    l.part_start = reinterpret_cast<int32_t*>(memory + w.part_start);
    l.part_stats = reinterpret_cast<float2*>(memory + w.part_stats);
    l.part_out = reinterpret_cast<float*>(memory + w.part_out);
    parts.push_back(part);
  }
  return parts;
}

namespace {

// --- pieces together ---

constexpr int kCombineThreads = 128;
constexpr int kCombineChannels = 32;  // of a block: a long list is put together by several blocks
constexpr int kCombineLanes = kCombineChannels / 4;
constexpr int kCombineGroups =
    kCombineThreads / kCombineLanes;  // of threads, a piece each at a time

// Block: row and head (x), channels (y). Pieces are added in an order that depends on their number
// alone.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const DecodeLaunch l, int32_t head_dim, int32_t first_row) {
  __shared__ float weight[kFewRowsPieces];
  __shared__ float reduced[2][kCombineThreads / kWarp];
  __shared__ float4 sums[kCombineGroups][kCombineLanes];
  __shared__ int32_t warp_parts[kCombineThreads / kWarp];
  // The next kernel may take its places now: it waits for this one's end before it reads anything.
  admit_launch_behind();
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t row = first_row + static_cast<int32_t>(blockIdx.x) / l.q_heads;
  const int32_t head = static_cast<int32_t>(blockIdx.x) % l.q_heads;

  // The sequence: as many end at or before this row as there are before it.
  const int32_t sequences = l.lists / l.kv_heads;
  int32_t b = 0;
  for (int32_t s = 0; s < sequences; s += kCombineThreads) {
    b += __syncthreads_count(s + thread < sequences && l.row_start[s + thread + 1] <= row);
  }
  const int32_t list = b * l.kv_heads + head / l.group;
  const int32_t start = l.row_start[b];
  const int32_t rows = (l.row_start[b + 1] - start) * l.group;
  const int32_t pieces = cut_list(rows, l.keys[list].count).pieces;
  // Where the list's partial results begin. A few lists are summed up here, while the kernel before
  // still runs; a load after the wait would be one more that all others wait for.
  const bool few_lists = l.lists <= kCombineThreads;
  int32_t part_start = 0;
  if (few_lists) {
    if (thread < list) {
      const int32_t its_rows = packed_rows_of(l, thread);
      part_start = partial_rows(its_rows, cut_list(its_rows, l.keys[thread].count));
    }
    part_start = __reduce_add_sync(~0u, part_start);
    if (lane_id() == 0) warp_parts[thread / kWarp] = part_start;
    __syncthreads();
    part_start = 0;
    for (int w = 0; w < kCombineThreads / kWarp; ++w) part_start += warp_parts[w];
  }
  // Before any block ends: what follows in the stream waits for this kernel alone.
  await_launch_before();
  if (pieces == 1) return;

  if (!few_lists) part_start = l.part_start[list];
  const int64_t part = int64_t{part_start} + (row - start) * l.group + head % l.group;
  const int lane = thread % kCombineLanes, group = thread / kCombineLanes;
  const int32_t channel = static_cast<int32_t>(blockIdx.y) * kCombineChannels + 4 * lane;
  const auto channels_of = [&](int32_t piece) {
    return *reinterpret_cast<const float4*>(l.part_out + (part + int64_t{piece} * rows) * head_dim +
                                            channel);
  };
  // On their way before the weights are known: both come after the same wait.
  constexpr int kAhead = 4;
  float4 ahead[kAhead] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (group + i * kCombineGroups < pieces) ahead[i] = channels_of(group + i * kCombineGroups);
  }
  float highest = -INFINITY;
  for (int32_t p = thread; p < pieces; p += kCombineThreads) {
    highest = fmaxf(highest, l.part_stats[part + int64_t{p} * rows].x);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
  }
  if (lane_id() == 0) reduced[0][thread / kWarp] = highest;
  __syncthreads();
  for (int w = 0; w < kCombineThreads / kWarp; ++w) highest = fmaxf(highest, reduced[0][w]);
  const float from = highest == -INFINITY ? 0.0f : highest;
  float total = 0.0f;
  for (int32_t p = thread; p < pieces; p += kCombineThreads) {
    const float2 stats = l.part_stats[part + int64_t{p} * rows];
    weight[p] = exp2_fast(stats.x - from);
    total += weight[p] * stats.y;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  if (lane_id() == 0) reduced[1][thread / kWarp] = total;
  __syncthreads();
  total = 0.0f;
  for (int w = 0; w < kCombineThreads / kWarp; ++w) total += reduced[1][w];

  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&](int32_t piece, const float4& x) {
    const float w = weight[piece];
    sum.x += w * x.x;
    sum.y += w * x.y;
    sum.z += w * x.z;
    sum.w += w * x.w;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (group + i * kCombineGroups < pieces) add(group + i * kCombineGroups, ahead[i]);
  }
#pragma unroll 4
  for (int32_t p = group + kAhead * kCombineGroups; p < pieces; p += kCombineGroups) {
    add(p, channels_of(p));
  }
  sums[group][lane] = sum;
  __syncthreads();
  const int64_t vector = int64_t{row} * l.q_heads + head;
  if (group == 0) {
    for (int g = 1; g < kCombineGroups; ++g) {
      const float4 x = sums[g][lane];
      sum.x += x.x;
      sum.y += x.y;
      sum.z += x.z;
      sum.w += x.w;
    }
    const float factor = inverse_of(total);
    const uint2 packed = {pack(sum.x * factor, sum.y * factor),
                          pack(sum.z * factor, sum.w * factor)};
    *reinterpret_cast<uint2*>(l.out + vector * head_dim + channel) = packed;
  }
  if (blockIdx.y == 0 && thread == 0) store_row_stats(l, vector, highest, total);
}

// --- mass ---

// Block: page (x) and list (y); each warp has 16 of the page's keys and goes over all rows of the
// sequence.
template <int kHeadDim>
__global__ void __launch_bounds__(kComputeWarps* kWarp) mass_kernel(const DecodeLaunch l) {
  constexpr GpuPage kLayout{kHeadDim};
  constexpr int kSteps = kHeadDim / 16;
  const int32_t list = static_cast<int32_t>(blockIdx.y);
  const CachedKeys& keys = l.keys[list];
  const int32_t before = static_cast<int32_t>(blockIdx.x) * kPageKeys;
  if (keys.mass == nullptr || before >= keys.count) return;
  const int lane = lane_id(), quad = lane % 4;
  const int32_t key = 16 * (static_cast<int32_t>(threadIdx.x) / kWarp);
  const auto* page = static_cast<const uint8_t*>(keys.pages[blockIdx.x]);

  uint32_t k[2][kSteps][2];
  int32_t position[2][2], last[2][2];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int32_t row = key + 8 * tile + lane / 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t element = kLayout.element(row, 16 * step + 8 * half + 2 * quad);
        k[tile][step][half] = *reinterpret_cast<const uint32_t*>(page + 2 * element);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t at = key + 8 * tile + 2 * quad + e;
      const bool exists = before + at < keys.count;
      position[tile][e] = reinterpret_cast<const int32_t*>(page + kLayout.position())[at];
      last[tile][e] = !exists ? -1
                      : keys.last != nullptr
                          ? keys.last[before + at]
                          : reinterpret_cast<const int32_t*>(page + kLayout.last())[at];
    }
  }

  Item item{};
  item.list = list;
  item.row_start = l.row_start[list / l.kv_heads];
  item.packed_rows = packed_rows_of(l, list);
  float mass[2][2] = {};
  for (int32_t first = 0; first < item.packed_rows; first += 16) {
    float score[2][4] = {};
    const uint32_t* from[2];
    int32_t at[2];
    float highest[2], inverse[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t wanted = first + lane / 4 + 8 * half;
      exists[half] = wanted < item.packed_rows;
      const int32_t row = exists[half] ? wanted : item.packed_rows - 1;
      const int64_t vector = vector_of(l, item, row);
      from[half] = reinterpret_cast<const uint32_t*>(l.q + vector * kHeadDim + 2 * quad);
      at[half] = l.row_position[item.row_start + row / l.group];
      const float2 stats = l.row_stats[vector];
      highest[half] = stats.x;
      inverse[half] = inverse_of(stats.y);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t q[4] = {from[0][step * 8], from[1][step * 8], from[0][step * 8 + 4],
                             from[1][step * 8 + 4]};
      multiply_add(score[0], q, k[0][step][0], k[0][step][1]);
      multiply_add(score[1], q, k[1][step][0], k[1][step][1]);
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        if (exists[half] && visible(at[half], position[tile][e % 2], last[tile][e % 2])) {
          // The very numbers that the total is the sum of: a score is rounded as it was there, not
          // fused into the difference. A row that sees one key gives it 1 and no less.
          const float s = __fmul_rn(score[tile][e], l.scale_log2);
          mass[tile][e % 2] += exp2_fast(s - highest[half]) * inverse[half];
        }
      }
    }
  }
  // The rows of a key are spread over the 8 lanes with its quad.
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = mass[tile][e];
      for (int step = 4; step < kWarp; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const int32_t at = key + 8 * tile + 2 * quad + e;
      if (lane < 4 && before + at < keys.count) keys.mass[before + at] = sum;
    }
  }
}

// --- attention ---

template <int kHeadDim>
struct Config {
  static constexpr int kThreads = kComputeWarps * kWarp;
  // A second page of head size 256 is not there; other blocks on the multiprocessor fill the wait.
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;
  struct Apart {
    SharedPage<kHeadDim> page[kStages];
    MergeBuffer<kHeadDim> merge;
  };
  union Together {  // merging begins when all pages of an item are done, and ends before the next
    SharedPage<kHeadDim> page[kStages];
    MergeBuffer<kHeadDim> merge;
  };
  struct Shared {
    std::conditional_t<kStages == 2, Apart, Together> work;
    ItemTable items;
  };
  // What every GPU from compute capability 8.0 on gives a block.
  static_assert(sizeof(Shared) <= 99 * 1024);
};

// This thread's share of copying a page. Each copy is 16 bytes and goes past the registers.
template <int kHeadDim>
__device__ inline void copy_page(SharedPage<kHeadDim>& to, const void* from) {
  const auto* source = static_cast<const uint8_t*>(from);
  const uint32_t target = shared_address(to.bytes);
  for (int at = static_cast<int>(threadIdx.x) * 16; at < SharedPage<kHeadDim>::kBytes;
       at += Config<kHeadDim>::kThreads * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + at), "l"(source + at)
                 : "memory");
  }
}
__device__ inline void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kPending` of this thread's groups are on their way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <int kHeadDim>
__global__ void __launch_bounds__(Config<kHeadDim>::kThreads)
    attention_decode_kernel(const DecodeLaunch l) {
  using C = Config<kHeadDim>;
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  const int warp = warp_id();

  fill_items<C::kThreads>(l, shared.items);
  if (blockIdx.x == 0) {
    for (int32_t list = static_cast<int32_t>(threadIdx.x); list < l.lists; list += C::kThreads) {
      l.part_start[list] = shared.items.part_start[list];
    }
  }
  const int32_t items = shared.items.start[l.lists];
  for (int32_t index = static_cast<int32_t>(blockIdx.x); index < items;
       index += static_cast<int32_t>(gridDim.x)) {
    const Item item = item_at(l, shared.items, index);
    const int32_t first = item.first_row + (item.few() ? 0 : 16 * warp);
    if (item.page < item.page_end) copy_page(shared.work.page[0], item.pages[item.page]);
    end_copy_group();
    WarpRows<kHeadDim> rows;
    const bool has_rows = rows.load(l, item, first);
    for (int32_t page = item.page; page < item.page_end; ++page) {
      const int stage = (page - item.page) % C::kStages;
      const auto copy_next = [&](int to) {
        if (page + 1 < item.page_end) copy_page(shared.work.page[to], item.pages[page + 1]);
        end_copy_group();
      };
      if (C::kStages == 2) copy_next(stage ^ 1);
      wait_for_copies<C::kStages - 1>();  // all but the group just begun
      __syncthreads();
      if (has_rows) attend_page(shared.work.page[stage], item, page, l.scale_log2, warp, rows);
      __syncthreads();  // before the page is overwritten
      if (C::kStages == 1) copy_next(0);
    }
    if (item.few()) {
      store_few(l, item, warp, rows, shared.work.merge, [] { __syncthreads(); });
    } else if (has_rows) {
      store_many(l, item, first, rows);
    }
  }
}

template <int kHeadDim>
void launch(const DecodePart& part, CUstream_st* stream) {
  using C = Config<kHeadDim>;
  const auto kernel = attention_decode_kernel<kHeadDim>;
  const int bytes = static_cast<int>(sizeof(typename C::Shared));
  NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  int device = 0, processors = 0, blocks = 0;
  NATSLM_CUDA(cudaGetDevice(&device));
  NATSLM_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  NATSLM_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, C::kThreads, bytes));
  const int64_t grid =
      std::min<int64_t>(part.most_items, int64_t{processors} * std::max(1, blocks));
  kernel<<<static_cast<unsigned>(grid), C::kThreads, bytes, stream>>>(part.launch);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace

void launch_combine(const DecodePart& part, int32_t head_dim, bool overlap, CUstream_st* stream) {
  const dim3 grid(static_cast<unsigned>(int64_t{part.rows} * part.launch.q_heads),
                  static_cast<unsigned>(head_dim / kCombineChannels));
  if (overlap) {
    launch_dependent(combine_kernel, grid, kCombineThreads, 0, stream, part.launch, head_dim,
                     part.first_row);
    return;
  }
  combine_kernel<<<grid, kCombineThreads, 0, stream>>>(part.launch, head_dim, part.first_row);
  NATSLM_CUDA(cudaGetLastError());
}

void launch_mass(const DecodePart& part, int32_t head_dim, int32_t max_count, CUstream_st* stream) {
  if (max_count == 0) return;
  const dim3 grid(static_cast<unsigned>(pages_of(max_count)),
                  static_cast<unsigned>(part.launch.lists));
  with_gpu_head_dim(head_dim, [&]<int kHeadDim>() {
    mass_kernel<kHeadDim><<<grid, kComputeWarps * kWarp, 0, stream>>>(part.launch);
  });
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const AttentionDecode& p) {
  return why_not_gpu(p);
}

size_t workspace_bytes(const AttentionDecode& p) {
  return decode_workspace_bytes(p);
}

void run(const AttentionDecode& p, CUstream_st* stream) {
  check_decode_supported("attention_decode (cuda)", why_not(p), p);
  for (const DecodePart& part : decode_parts(p)) {
    if (part.most_items > 0) {
      with_gpu_head_dim(p.head_dim, [&]<int kHeadDim>() { launch<kHeadDim>(part, stream); });
      if (part.may_be_cut) launch_combine(part, p.head_dim, false, stream);
    }
    if (p.mass) launch_mass(part, p.head_dim, p.max_count, stream);
  }
}

}  // namespace natslm::kernels::cuda
