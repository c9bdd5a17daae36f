// Gather, runs, bounds and work lists: all bound by memory or latency, none by arithmetic.
//
//   sorted:    gather (K, V, position, last; clears the counts) -> find_all_runs -> order_work
//   position:  bound_key_tiles (clears the counts) -> count_live_tiles -> order_work
//
// Each begins while the one before it ends (dependent_launch.cuh).
//
// Counts are added up with integer atomics, whose order changes no sum: every run is bit for bit
// the same.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/carver.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/dependent_launch.cuh"
#include "natslm/kernels/cuda/key_runs.h"
#include "natslm/kernels/cuda/sorted_keys.h"
#include "natslm/kernels/gpu_head_dim.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

WorkScratch take_scratch(Carver& carver, const PlanShape& shape) {
  const int64_t items = shape.work_items();
  return {carver.take<uint16_t>(items),
          carver.take<uint32_t>(int64_t{work_chunks(items).chunks} * kWorkBuckets)};
}

SortedKeys take_sorted_keys(Carver& carver, const PlanShape& shape) {
  const int64_t keys = int64_t{shape.batch} * shape.kv_heads * shape.tokens;
  SortedKeys to;
  to.k = carver.take<uint16_t>(keys * shape.head_dim);
  to.v = carver.take<uint16_t>(keys * shape.head_dim);
  to.position = carver.take<int32_t>(keys);
  to.last = carver.take<int32_t>(keys);
  to.runs = carver.take<KeyRun>(shape.work_items() * KeyOrder::kSegments);
  to.work = carver.take<int32_t>(shape.work_items());
  to.next_item = carver.take<int32_t>(1);
  to.scratch = take_scratch(carver, shape);
  return to;
}

__host__ __device__ constexpr int32_t bound_tiles(int32_t tokens) {
  return (tokens + kBoundKeys - 1) / kBoundKeys;
}

PositionBounds take_position_bounds(Carver& carver, const PlanShape& shape) {
  const int64_t tiles = int64_t{shape.batch} * shape.kv_heads * bound_tiles(shape.tokens);
  PositionBounds to;
  to.min_last = carver.take<int32_t>(tiles);
  to.max_last = carver.take<int32_t>(tiles);
  to.work = carver.take<int32_t>(shape.work_items());
  to.next_item = carver.take<int32_t>(1);
  to.scratch = take_scratch(carver, shape);
  return to;
}

__device__ int32_t length_of(const int32_t* lengths, int32_t b, int32_t tokens) {
  return lengths ? lengths[b] : tokens;
}

// The tile's queries are [first, last]; none (last < first) past the length.
struct TileQueries {
  int32_t first, last;
};
__device__ TileQueries queries_of(const PlanShape& shape, int32_t tile, int32_t length) {
  const int32_t first = tile * shape.tile_queries;
  return {first, min(first + shape.tile_queries, length) - 1};
}

__device__ void clear_counts(const WorkScratch& scratch, int32_t* next_item, int32_t chunks) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *next_item = 0;
  const int32_t stride = gridDim.x * blockDim.x;
  for (int32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < chunks * kWorkBuckets; i += stride) {
    scratch.counts[i] = 0;
  }
}

struct Gather {
  PlanShape shape;
  const uint16_t *k, *v;
  Strides k_stride, v_stride;
  const int32_t *last, *lengths, *order;
  SortedKeys to;
  int32_t chunks;
};

constexpr int kGatherThreads = 256;
constexpr int kGatherPasses = 4;  // rows of K and of V that a thread has in flight

// A thread moves 16 bytes of a row; a block a run of places of one (sequence, KV head).
template <int kHeadDim>
struct GatherTile {
  static constexpr int kLanes = kHeadDim * 2 / 16;
  static constexpr int kRowsPerPass = kGatherThreads / kLanes;
  static constexpr int kRows = kRowsPerPass * kGatherPasses;
};

template <int kHeadDim>
__global__ void __launch_bounds__(kGatherThreads) gather(const Gather p) {
  using Tile = GatherTile<kHeadDim>;
  admit_launch_behind();
  clear_counts(p.to.scratch, p.to.next_item, p.chunks);
  const int32_t tokens = p.shape.tokens;
  const int32_t parts = (tokens + Tile::kRows - 1) / Tile::kRows;
  const int32_t row = blockIdx.x / parts, first = (blockIdx.x % parts) * Tile::kRows;
  const int32_t b = row / p.shape.kv_heads, head = row % p.shape.kv_heads;
  const int32_t length = length_of(p.lengths, b, tokens);
  const int64_t base = int64_t{row} * tokens;
  const int lane = threadIdx.x % Tile::kLanes, slot = threadIdx.x / Tile::kLanes;

  int32_t key[kGatherPasses];
#pragma unroll
  for (int i = 0; i < kGatherPasses; ++i) {
    const int32_t place = first + i * Tile::kRowsPerPass + slot;
    key[i] = place < length ? p.order[base + place] : -1;
  }
  uint4 k[kGatherPasses], v[kGatherPasses];
  const uint16_t* from_k = p.k + b * p.k_stride.batch + head * p.k_stride.head + lane * 8;
  const uint16_t* from_v = p.v + b * p.v_stride.batch + head * p.v_stride.head + lane * 8;
#pragma unroll
  for (int i = 0; i < kGatherPasses; ++i) {
    k[i] = v[i] = make_uint4(0, 0, 0, 0);
    if (key[i] >= 0) {
      k[i] = __ldg(reinterpret_cast<const uint4*>(from_k + key[i] * p.k_stride.token));
      v[i] = __ldg(reinterpret_cast<const uint4*>(from_v + key[i] * p.v_stride.token));
    }
  }
  auto* to_k = static_cast<uint4*>(p.to.k) + base * Tile::kLanes + lane;
  auto* to_v = static_cast<uint4*>(p.to.v) + base * Tile::kLanes + lane;
#pragma unroll
  for (int i = 0; i < kGatherPasses; ++i) {
    const int32_t place = first + i * Tile::kRowsPerPass + slot;
    if (place < tokens) {
      to_k[int64_t{place} * Tile::kLanes] = k[i];
      to_v[int64_t{place} * Tile::kLanes] = v[i];
    }
  }

  const int32_t place = first + threadIdx.x;
  if (threadIdx.x < Tile::kRows && place < tokens) {
    const int32_t position = place < length ? p.order[base + place] : kMaxPosition;
    p.to.position[base + place] = position;
    p.to.last[base + place] = place < length ? p.last[base + position] : -1;
  }
}

struct FindRuns {
  PlanShape shape;
  const int32_t *lengths, *ends;
  int32_t reach;
  SortedKeys to;
  int32_t items, items_per_chunk;
};

constexpr int kRunThreads = 256;
constexpr int kRunLanes = 16;  // a lane a bound of a run, four idle: latency counts here
constexpr int kRunTiles = kRunThreads / kRunLanes;
static_assert(KeyOrder::kSegments * kRunBounds <= kRunLanes);
static_assert(kWorkSlice % kRunTiles == 0, "a block's tiles must lie in one chunk of work items");

__global__ void __launch_bounds__(kRunThreads) find_all_runs(const FindRuns p) {
  admit_launch_behind();
  await_launch_before();
  __shared__ int32_t bucket_of[kRunTiles];
  const int lane = threadIdx.x % kRunLanes;
  const int segment = lane / kRunBounds, bound = lane % kRunBounds;
  const int32_t item = blockIdx.x * kRunTiles + threadIdx.x / kRunLanes;
  const int32_t tiles = p.shape.tiles(), row = item / tiles, tile = item % tiles;

  int32_t place = 0;
  const bool has_bound = item < p.items && segment < KeyOrder::kSegments;
  if (has_bound) {
    const TileQueries queries =
        queries_of(p.shape, tile, length_of(p.lengths, row / p.shape.kv_heads, p.shape.tokens));
    if (queries.first <= queries.last) {
      const int64_t base = int64_t{row} * p.shape.tokens;
      place = first_place(run_search(segment, bound, p.to.position + base, p.to.last + base,
                                     p.ends + row * KeyOrder::kSegments, p.reach, queries.first,
                                     queries.last));
    }
  }
  const KeyRun run = ordered_run(
      __shfl_sync(kAllLanes, place, 0, kRunBounds), __shfl_sync(kAllLanes, place, 1, kRunBounds),
      __shfl_sync(kAllLanes, place, 2, kRunBounds), __shfl_sync(kAllLanes, place, 3, kRunBounds));
  if (has_bound && bound == 0) {
    reinterpret_cast<int4*>(p.to.runs)[int64_t{item} * KeyOrder::kSegments + segment] =
        make_int4(run.begin, run.full_begin, run.full_end, run.end);
  }
  int32_t keys = run.end - run.begin;  // 0 in the idle lanes
  keys += __shfl_xor_sync(kAllLanes, keys, kRunBounds);
  keys += __shfl_xor_sync(kAllLanes, keys, 2 * kRunBounds);
  if (lane == 0) {
    const bool has_item = item < p.items;
    const int32_t bucket = has_item ? work_bucket(keys, p.shape.tokens) : kWorkBuckets;
    bucket_of[threadIdx.x / kRunLanes] = bucket;
    if (has_item) p.to.scratch.bucket[item] = static_cast<uint16_t>(bucket);
  }
  __syncthreads();
  // Neighbours mostly share a bucket: one addition for all of them.
  if (threadIdx.x < kRunTiles) {
    constexpr unsigned kLanes = (1u << kRunTiles) - 1;
    const int32_t bucket = bucket_of[threadIdx.x];
    const unsigned same = __match_any_sync(kLanes, bucket);
    if (bucket < kWorkBuckets && threadIdx.x == __ffs(same) - 1) {
      const int32_t chunk = blockIdx.x * kRunTiles / p.items_per_chunk;
      atomicAdd(p.to.scratch.counts + int64_t{chunk} * kWorkBuckets + bucket, __popc(same));
    }
  }
}

struct BoundKeys {
  PlanShape shape;
  const int32_t *last, *lengths;
  PositionBounds to;
  int32_t chunks;
};

constexpr int kBoundThreads = 256;

// A warp a key tile.
__global__ void __launch_bounds__(kBoundThreads) bound_key_tiles(const BoundKeys p) {
  admit_launch_behind();
  clear_counts(p.to.scratch, p.to.next_item, p.chunks);
  const int32_t tiles = bound_tiles(p.shape.tokens), rows = p.shape.batch * p.shape.kv_heads;
  const int64_t number = (int64_t{blockIdx.x} * kBoundThreads + threadIdx.x) / kWarp;
  if (number >= int64_t{rows} * tiles) return;
  const auto row = static_cast<int32_t>(number / tiles);
  const int32_t first = static_cast<int32_t>(number % tiles) * kBoundKeys;
  const int32_t length = length_of(p.lengths, row / p.shape.kv_heads, p.shape.tokens);
  const int lane = threadIdx.x % kWarp;
  int32_t low = kForever, high = -1;
#pragma unroll
  for (int i = 0; i < kBoundKeys; i += kWarp) {
    if (first + i + lane < length) {
      const int32_t last = p.last[int64_t{row} * p.shape.tokens + first + i + lane];
      low = min(low, last);
      high = max(high, last);
    }
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane == 0) {
    p.to.min_last[number] = low;
    p.to.max_last[number] = high;
  }
}

struct CountTiles {
  PlanShape shape;
  const int32_t* lengths;
  PositionBounds to;
  int32_t items, items_per_chunk;
};

// A warp a query tile.
__global__ void __launch_bounds__(kBoundThreads) count_live_tiles(const CountTiles p) {
  admit_launch_behind();
  await_launch_before();
  const int64_t number = (int64_t{blockIdx.x} * kBoundThreads + threadIdx.x) / kWarp;
  if (number >= p.items) return;
  const auto item = static_cast<int32_t>(number);
  const int lane = threadIdx.x % kWarp;
  const int32_t tiles = p.shape.tiles(), row = item / tiles, tile = item % tiles;
  const TileQueries queries =
      queries_of(p.shape, tile, length_of(p.lengths, row / p.shape.kv_heads, p.shape.tokens));
  int32_t live = 0;
  if (queries.first <= queries.last) {
    const int32_t* max_last = p.to.max_last + int64_t{row} * bound_tiles(p.shape.tokens);
    for (int32_t k = lane; k <= queries.last / kBoundKeys; k += kWarp) {
      live += max_last[k] >= queries.first;
    }
  }
  live = __reduce_add_sync(kAllLanes, live);
  if (lane == 0) {
    const int32_t bucket = work_bucket(live * kBoundKeys, p.shape.tokens);
    p.to.scratch.bucket[item] = static_cast<uint16_t>(bucket);
    const int32_t chunk = item / p.items_per_chunk;
    atomicAdd(p.to.scratch.counts + int64_t{chunk} * kWorkBuckets + bucket, 1u);
  }
}

constexpr int kOrderThreads = kWorkWarps * kWarp;
constexpr int kBucketsPerThread = kWorkBuckets / kOrderThreads;
static_assert(kBucketsPerThread == 4, "a thread reads its buckets' counts as one uint4");

// Inclusive sum over the lanes.
__device__ uint32_t warp_sum_to(uint32_t x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, x, d);
    if (lane >= d) x += other;
  }
  return x;
}

// Calls body(item, bucket, lanes with the same bucket) for a warp's slice, in order; the body is
// called by all lanes, with bucket kWorkBuckets where there is no item. Loads run ahead of the
// body, whose additions depend on one another.
template <class Body>
__device__ void for_slice(const uint16_t* buckets, int32_t begin, int32_t end, const Body& body) {
  constexpr int kAhead = kWorkSlice / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int32_t first = begin; first < end; first += kWorkSlice) {
    int32_t bucket[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int32_t item = first + i * kWarp + lane;
      bucket[i] = item < end ? buckets[item] : kWorkBuckets;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      body(first + i * kWarp + lane, bucket[i], __match_any_sync(kAllLanes, bucket[i]));
      __syncwarp();
    }
  }
}

// A block a chunk of items. Stable: a bucket's places go to earlier chunks first, within a chunk to
// earlier warps, within a warp to earlier lanes.
__global__ void __launch_bounds__(kOrderThreads)
    order_work(const WorkScratch scratch, WorkChunks chunks, int32_t items, int32_t* work) {
  __shared__ __align__(16) uint32_t next[kWorkWarps][kWorkBuckets];  // next free place
  __shared__ uint32_t warp_total[kWorkWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  admit_launch_behind();
  for (int i = threadIdx.x; i < kWorkWarps * kWorkBuckets / 4; i += kOrderThreads) {
    reinterpret_cast<uint4*>(next)[i] = make_uint4(0, 0, 0, 0);
  }
  await_launch_before();
  __syncthreads();

  const int32_t slice = chunks.items / kWorkWarps;
  const int32_t begin = min(blockIdx.x * chunks.items + warp * slice, items);
  const int32_t end = min(begin + slice, items);
  const auto is_first = [&](unsigned same) { return lane == __ffs(same) - 1; };
  for_slice(scratch.bucket, begin, end, [&](int32_t, int32_t bucket, unsigned same) {
    if (bucket < kWorkBuckets && is_first(same)) next[warp][bucket] += __popc(same);
  });

  // Of this thread's buckets: items of all chunks, and of those before this one.
  uint32_t total[kBucketsPerThread] = {}, before[kBucketsPerThread] = {};
  for (int32_t chunk = 0; chunk < chunks.chunks; ++chunk) {
    const uint4 c =
        reinterpret_cast<const uint4*>(scratch.counts)[chunk * kOrderThreads + threadIdx.x];
    const uint32_t count[] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < kBucketsPerThread; ++i) {
      total[i] += count[i];
      before[i] += chunk < blockIdx.x ? count[i] : 0;
    }
  }
  const uint32_t mine = total[0] + total[1] + total[2] + total[3];
  const uint32_t up_to_me = warp_sum_to(mine);
  if (lane == kWarp - 1) warp_total[warp] = up_to_me;
  __syncthreads();  // also: all slices are counted
  uint32_t start = up_to_me - mine;
  for (int w = 0; w < warp; ++w) start += warp_total[w];
#pragma unroll
  for (int i = 0; i < kBucketsPerThread; ++i) {
    const int bucket = threadIdx.x * kBucketsPerThread + i;
    uint32_t place = start + before[i];
    for (int w = 0; w < kWorkWarps; ++w) {
      const uint32_t count = next[w][bucket];
      next[w][bucket] = place;
      place += count;
    }
    start += total[i];
  }
  __syncthreads();

  for_slice(scratch.bucket, begin, end, [&](int32_t item, int32_t bucket, unsigned same) {
    uint32_t place = 0;
    if (bucket < kWorkBuckets) {
      place = next[warp][bucket] + __popc(same & ((1u << lane) - 1));
      work[place] = item;
    }
    __syncwarp();
    if (bucket < kWorkBuckets && is_first(same)) next[warp][bucket] = place + __popc(same);
  });
}

unsigned blocks_for(int64_t threads, int block) {
  return static_cast<unsigned>((threads + block - 1) / block);
}

void check(const PlanShape& shape) {
  NATSLM_CHECK(shape.tile_queries > 0, "a query tile must have at least one query, got ",
               shape.tile_queries);
  NATSLM_CHECK(shape.work_items() <= kMaxPosition, "attention: ", shape.work_items(),
               " query tiles are more than a 32-bit number holds; use a smaller batch");
}

template <int kHeadDim>
void launch_gather(const Gather& p, CUstream_st* stream) {
  const int32_t rows = p.shape.batch * p.shape.kv_heads;
  const int64_t parts =
      (p.shape.tokens + GatherTile<kHeadDim>::kRows - 1) / GatherTile<kHeadDim>::kRows;
  gather<kHeadDim><<<static_cast<unsigned>(rows * parts), kGatherThreads, 0, stream>>>(p);
  NATSLM_CUDA(cudaGetLastError());
}

void launch_order_work(const WorkScratch& scratch, int64_t items, int32_t* work,
                       CUstream_st* stream) {
  const WorkChunks chunks = work_chunks(items);
  launch_dependent(order_work, chunks.chunks, kOrderThreads, 0, stream, scratch, chunks,
                   static_cast<int32_t>(items), work);
}

}  // namespace

size_t sorted_keys_bytes(const PlanShape& shape) {
  Carver carver(nullptr);
  take_sorted_keys(carver, shape);
  return carver.used();
}

SortedKeys sorted_keys_in(void* workspace, const PlanShape& shape) {
  Carver carver(workspace);
  return take_sorted_keys(carver, shape);
}

size_t position_bounds_bytes(const PlanShape& shape) {
  Carver carver(nullptr);
  take_position_bounds(carver, shape);
  return carver.used();
}

PositionBounds position_bounds_in(void* workspace, const PlanShape& shape) {
  Carver carver(workspace);
  return take_position_bounds(carver, shape);
}

void launch_sort_keys(const PlanShape& shape, const void* k, Strides k_stride, const void* v,
                      Strides v_stride, const int32_t* last, const int32_t* lengths,
                      const KeyOrder& order, const SortedKeys& to, CUstream_st* stream) {
  check(shape);
  NATSLM_CHECK(is_gpu_head_dim(shape.head_dim), "attention: keys of head_dim ", list(kGpuHeadDims),
               " can be sorted, got ", shape.head_dim);
  const int64_t items = shape.work_items();
  if (items == 0) return;
  const WorkChunks chunks = work_chunks(items);
  const Gather p = {shape,
                    static_cast<const uint16_t*>(k),
                    static_cast<const uint16_t*>(v),
                    k_stride,
                    v_stride,
                    last,
                    lengths,
                    order.order,
                    to,
                    chunks.chunks};
  with_gpu_head_dim(shape.head_dim, [&]<int kHeadDim>() { launch_gather<kHeadDim>(p, stream); });
  const FindRuns runs = {
      shape, lengths, order.ends, order.reach, to, static_cast<int32_t>(items), chunks.items};
  launch_dependent(find_all_runs, blocks_for(items, kRunTiles), kRunThreads, 0, stream, runs);
  launch_order_work(to.scratch, items, to.work, stream);
}

void launch_position_bounds(const PlanShape& shape, const int32_t* last, const int32_t* lengths,
                            const PositionBounds& to, CUstream_st* stream) {
  check(shape);
  const int64_t items = shape.work_items();
  if (items == 0) return;
  const WorkChunks chunks = work_chunks(items);
  const int64_t key_tiles = int64_t{shape.batch} * shape.kv_heads * bound_tiles(shape.tokens);
  bound_key_tiles<<<blocks_for(key_tiles * kWarp, kBoundThreads), kBoundThreads, 0, stream>>>(
      {shape, last, lengths, to, chunks.chunks});
  NATSLM_CUDA(cudaGetLastError());
  const CountTiles count = {shape, lengths, to, static_cast<int32_t>(items), chunks.items};
  launch_dependent(count_live_tiles, blocks_for(items * kWarp, kBoundThreads), kBoundThreads, 0,
                   stream, count);
  launch_order_work(to.scratch, items, to.work, stream);
}

}  // namespace natslm::kernels::cuda
