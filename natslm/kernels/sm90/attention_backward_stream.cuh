// What the Hopper kernels have in common in which a block owns keys: the keys of a block and the
// warp that loads them and the queries that read them; the role sums.
//
// Scores are transposed: rows are keys, 64 to a consumer warpgroup, columns queries of one query
// head. Rows of keys that are not the block's own hold something else; no product mixes rows.
//
// The producer warp takes span after span from a list in which the longest come early, and fills a
// ring of stages, each with a tile of queries: Q, dout and the terms of its rows. Every consumer
// waits for every stage and hands it back exactly once, also where it has nothing to do there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/sm90/attention_backward.h"
#include "natslm/kernels/sm90/attention_backward_tiles.h"
#include "natslm/kernels/sm90/attention_forward.cuh"
#include "natslm/kernels/sm90/hopper.cuh"
#include "natslm/kernels/sm90/tile_products.cuh"
#include "natslm/kernels/sm90/warp_roles.cuh"

namespace natslm::kernels::sm90 {

static_assert(kTileQueries == kTileRows && kWarpgroupKeys == kTileRows);

template <int kHeadDim>
struct QueryStage {
  static constexpr int kHalves = kHeadDim / kSwizzleColumns;
  TileHalf q[kHalves];
  TileHalf dout[kHalves];
};

struct TileTerms {
  float lse[kTileQueries];  // in octaves
  float delta[kTileQueries];
};

// A block's keys. Filled by the producer; a key outside the span has position kNoPosition and
// is never read.
template <int kConsumers>
struct KeyTable {
  static constexpr int kKeys = kConsumers * kWarpgroupKeys;
  int32_t batch;  // -1: there is no more work
  int32_t kv_head;
  cuda::KeySpan span;
  QueryTiles tiles;
  KeyBounds bounds[kConsumers];
  int32_t position[kKeys];
  int32_t last[kKeys];                   // -1 .. length - 1
  int32_t horizon[kMaxHorizons][kKeys];  // likewise; -1 also where there are fewer horizons
};
// Differences to the first query of a tile, which may be -kTileQueries, are numbers still.
inline constexpr int32_t kNoPosition = kMaxPosition - kTileQueries;

inline constexpr int kTables = 2;  // the producer is at most one block of keys ahead

// How many blocks of keys fit in; 1 where they come through the ring.
template <class Config>
constexpr int key_buffers() {
  if constexpr (Config::kKeysByStage) {
    return 1;
  } else {
    return Config::kKeyBuffers;
  }
}

// Config: kHeadDim, kConsumers, kStages, Shared with
//   QueryStage<kHeadDim> stage[kStages], TileTerms terms[kStages],
//   KeyTable<kConsumers> table[kTables], barriers full[kStages], empty[kStages],
//   full_table[kTables], empty_table[kTables]; and, unless kKeysByStage, kKeyBuffers, and in Shared
//   k, v [kKeyBuffers][kConsumers][kHalves][kWarpgroupKeys][kSwizzleColumns] with full_keys,
//   empty_keys [kKeyBuffers].
// kKeysByStage: keys come through the ring before the queries, one stage a warpgroup, K in the
// place of Q and V in that of dout.
template <class Config>
struct KeyParallelProducer {
  using Shared = typename Config::Shared;
  static constexpr int kHalves = Config::kHeadDim / kSwizzleColumns;
  static constexpr uint32_t kStageBytes = sizeof(Shared::stage[0]);
  static_assert(2 * kHalves < kWarpThreads);

  const KeyParallelArguments& a;
  Shared& shared;
  const int32_t lane;
  RingPosition<Config::kStages> ring;
  RingPosition<kTables> table_ring;
  RingPosition<key_buffers<Config>()> key_ring;

  // Which of a stage's 2 * kHalves tiles this lane loads.
  __device__ bool loads_q() const { return lane < kHalves; }
  __device__ bool loads_dout() const { return lane >= kHalves && lane < 2 * kHalves; }
  __device__ int32_t half() const { return lane % kHalves; }

  __device__ uint64_t& begin_stage(uint32_t bytes) {
    uint64_t& full = shared.full[ring.stage];
    barrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
    if (lane == 0) barrier_expect_bytes(full, bytes);
    __syncwarp();
    return full;
  }
  __device__ void end_stage(uint64_t& full) {
    __syncwarp();
    if (lane == 0) barrier_arrive(full);
    ring.advance();
  }

  // lse and delta come through registers: a copy by TMA would have to begin at a multiple of 16
  // bytes, and a tile may begin at any query. Queries before 0 count as zeros, as TMA reads them.
  __device__ void load_queries(int32_t batch, int32_t q_head, int32_t first) {
    const int64_t stride = row_terms_stride(a.tokens);
    const float* row = a.terms + (int64_t{batch} * a.kv_heads * a.group + q_head) * stride;
    float lse[kTileQueries / kWarpThreads], delta[kTileQueries / kWarpThreads];
#pragma unroll
    for (int i = 0; i < kTileQueries / kWarpThreads; ++i) {
      const int32_t query = first + i * kWarpThreads + lane;
      const bool exists = query >= 0 && query < a.tokens;
      lse[i] = exists ? row[query] : 0;
      delta[i] = exists ? row[stride / 2 + query] : 0;
    }
    uint64_t& full = begin_stage(kStageBytes);
    auto& stage = shared.stage[ring.stage];
    if (loads_q()) {
      tma_load(stage.q[half()], a.q, full, half() * kSwizzleColumns, first, q_head, batch);
    } else if (loads_dout()) {
      tma_load(stage.dout[half()], a.dout, full, half() * kSwizzleColumns, first, q_head, batch);
    }
    TileTerms& terms = shared.terms[ring.stage];
#pragma unroll
    for (int i = 0; i < kTileQueries / kWarpThreads; ++i) {
      terms.lse[i * kWarpThreads + lane] = lse[i];
      terms.delta[i * kWarpThreads + lane] = delta[i];
    }
    end_stage(full);
  }

  __device__ void load_keys(int32_t batch, int32_t kv_head, int32_t place) {
    if constexpr (Config::kKeysByStage) {
#pragma unroll 1
      for (int w = 0; w < Config::kConsumers; ++w) {
        uint64_t& full = begin_stage(kStageBytes);
        auto& stage = shared.stage[ring.stage];
        const int32_t row = place + w * kWarpgroupKeys;
        if (loads_q()) {
          tma_load(stage.q[half()], a.k, full, half() * kSwizzleColumns, row, kv_head, batch);
        } else if (loads_dout()) {
          tma_load(stage.dout[half()], a.v, full, half() * kSwizzleColumns, row, kv_head, batch);
        }
        end_stage(full);
      }
    } else {
      const int32_t buffer = key_ring.stage;
      uint64_t& full = shared.full_keys[buffer];
      barrier_wait(shared.empty_keys[buffer], key_ring.parity ^ 1);
      if (lane == 0) barrier_expect_bytes(full, sizeof(shared.k[0]) + sizeof(shared.v[0]));
      __syncwarp();
      if (lane < 2 * kHalves) {
#pragma unroll 1
        for (int w = 0; w < Config::kConsumers; ++w) {
          auto& to = loads_q() ? shared.k[buffer][w] : shared.v[buffer][w];
          tma_load(to[half()], loads_q() ? a.k : a.v, full, half() * kSwizzleColumns,
                   place + w * kWarpgroupKeys, kv_head, batch);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(full);
      key_ring.advance();
    }
  }

  // The bounds of a warpgroup's keys, whose table it fills.
  __device__ KeyBounds fill_keys(KeyTable<Config::kConsumers>& table, int32_t first_key,
                                 int64_t head, int32_t length) {
    const int64_t row = head * a.tokens;
    const int64_t plane = int64_t{a.batch} * a.kv_heads * a.tokens;
    KeyBounds of;
#pragma unroll
    for (int i = 0; i < kWarpgroupKeys; i += kWarpThreads) {
      const int32_t key = first_key + i + lane, place = table.span.begin + key;
      const bool in_span = place < table.span.end;
      KeyBounds one;
      int32_t position = kNoPosition, last = -1;
      if (in_span) {
        position = a.position ? a.position[row + place] : place;
        last = max(min(a.last[row + place], length - 1), -1);
        one = {position, position, last, last, -1};
      }
      table.position[key] = position;
      table.last[key] = last;
#pragma unroll
      for (int h = 0; h < kMaxHorizons; ++h) {
        const bool counts = in_span && h < a.horizon_count;
        const int32_t horizon =
            counts ? max(min(a.horizons[h * plane + row + position], length - 1), -1) : -1;
        table.horizon[h][key] = horizon;
        one.max_horizon = max(one.max_horizon, horizon);
      }
      of = unite(of, one);
    }
    return {__reduce_min_sync(~0u, of.first), __reduce_max_sync(~0u, of.last),
            __reduce_min_sync(~0u, of.min_last), __reduce_max_sync(~0u, of.max_last),
            __reduce_max_sync(~0u, of.max_horizon)};
  }

  __device__ void do_item(int32_t item) {
    const cuda::HeadSpan mine =
        cuda::head_span(item, a.batch * a.kv_heads, a.spans, a.heads_together);
    const int32_t batch = mine.head / a.kv_heads, kv_head = mine.head - batch * a.kv_heads;
    const int32_t length = a.lengths ? a.lengths[batch] : a.tokens;
    int32_t ends[KeyOrder::kSegments] = {length, length, length};
    if (a.ends) {
#pragma unroll
      for (int s = 0; s < KeyOrder::kSegments; ++s) {
        ends[s] = a.ends[int64_t{mine.head} * KeyOrder::kSegments + s];
      }
    }
    constexpr int32_t kKeys = KeyTable<Config::kConsumers>::kKeys;
    const cuda::KeySpan span = cuda::key_span(mine.span, ends, a.tokens, kKeys);
    if (span.begin >= span.end) return;  // a head has fewer spans than there is room for

    const int32_t t = table_ring.stage;
    auto& table = shared.table[t];
    barrier_wait(shared.empty_table[t], table_ring.parity ^ 1);
    QueryTiles tiles;
    if (lane == 0) {
      table.batch = batch;
      table.kv_head = kv_head;
      table.span = span;
    }
    __syncwarp();
    if (!span.past_length) {
      KeyBounds all;
#pragma unroll 1
      for (int w = 0; w < Config::kConsumers; ++w) {
        const KeyBounds of = fill_keys(table, w * kWarpgroupKeys, mine.head, length);
        if (lane == 0) table.bounds[w] = of;
        all = unite(all, of);
      }
      tiles = query_tiles(all);
    }
    if (lane == 0) table.tiles = tiles;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.full_table[t]);
    table_ring.advance();
    if (tiles.count == 0) return;

    if constexpr (Config::kKeysByStage) load_keys(batch, kv_head, span.begin);
    for (int32_t head = 0; head < a.group; ++head) {
      for (int32_t i = 1; i <= tiles.count; ++i) {
        load_queries(batch, kv_head * a.group + head, tiles.end - i * kTileQueries);
        if constexpr (!Config::kKeysByStage) {
          // After the first queries: a stage is free earlier than the keys of the block before.
          if (head == 0 && i == 1) load_keys(batch, kv_head, span.begin);
        }
      }
    }
  }

  __device__ int32_t next_item() {
    int32_t taken = 0;
    if (lane == 0) taken = atomicAdd(a.next_item, 1);
    return static_cast<int32_t>(gridDim.x) + __shfl_sync(~0u, taken, 0);
  }

  __device__ void run() {
    for (int32_t item = blockIdx.x; item < a.items; item = next_item()) do_item(item);
    barrier_wait(shared.empty_table[table_ring.stage], table_ring.parity ^ 1);
    if (lane == 0) {
      shared.table[table_ring.stage].batch = -1;
      barrier_arrive(shared.full_table[table_ring.stage]);
    }
  }
};

// A consumer's way through the tiles of queries, in the order of the producer.
template <int kStages>
struct QueryWalk {
  RingPosition<kStages> ring;
  QueryTiles tiles{};
  int32_t heads = 0, tile = 0;  // heads that are left, this one included; number in this one

  __device__ void start(const QueryTiles& of, int32_t group) {
    tiles = of;
    tile = 0;
    heads = of.count > 0 ? group : 0;
  }
  __device__ bool done() const { return heads == 0; }
  __device__ int32_t first_query() const { return tiles.end - (tile + 1) * kTileQueries; }
  __device__ void advance() {
    ring.advance();
    if (++tile == tiles.count) {
      tile = 0;
      --heads;
    }
  }
};

// Each warp hands back for itself.
__device__ inline void hand_back(uint64_t& empty) {
  if (threadIdx.x % kWarpThreads == 0) barrier_arrive(empty);
}

// ---- A consumer's accumulators [64 keys][kTileQueries], PairRegisters. ----

// Calls body(element, number of its query).
template <class Body>
__device__ inline void for_each_pair(const float (&numbers)[kTileQueries], const Body& body) {
  const auto* two = reinterpret_cast<const float2*>(&numbers[threadIdx.x % 4 * 2]);
#pragma unroll
  for (int n = 0; n < kTileQueries / 8; ++n) {
    const float2 of = two[4 * n];
    body(4 * n, of.x);
    body(4 * n + 1, of.y);
    body(4 * n + 2, of.x);
    body(4 * n + 3, of.y);
  }
}

// Number of the query of an element in the tile, less 2 (lane % 4).
__device__ constexpr int32_t query_of(int element) {
  return element / 4 * 8 + element % 2;
}

// Role sums of a thread's two keys, numbers `key` and `key` + 8 of the table's. Lane h of the four
// that share the keys holds those of horizon h.
struct RoleSums {
  float sum[2] = {0, 0};

  // g(element): of the thread's pairs with the tile. All lanes of the warp.
  template <int kConsumers, class G>
  __device__ void add(const KeyTable<kConsumers>& table, int32_t key, int32_t q0, const G& g) {
    const auto plus = [](float x, float y) { return x + y; };
    const int32_t lane = threadIdx.x % kWarpThreads, q1 = q0 + kTileQueries - 1;
    const int32_t shift = q0 + lane % 4 * 2;
    const int32_t* position = &table.position[key];
    const int32_t* horizon = &table.horizon[lane % 4][key];
    // Whether pairs need a test, for any key of the warp: where it begins, and, a bit a lane, where
    // its horizon cuts the tile. One that does not exist has no horizon to be cut.
    bool begins = false, cut = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t first = position[8 * row], last = horizon[8 * row];
      begins |= first > q0 && first != kNoPosition;
      cut |= last >= q0 && last < q1;
    }
    begins = __any_sync(~0u, begins);
    const uint32_t cuts = __ballot_sync(~0u, cut);
    constexpr uint32_t kLanesOfHorizon = 0x11111111;

    // Horizons that are not cut see all of the tile from the key on, or nothing.
    float total[2] = {0, 0};
    if (begins) {
#pragma unroll
      for (int i = 0; i < kPairsOfThread; ++i) {
        const int32_t first = position[i / 2 % 2 * 8] - shift;
        if (query_of(i) >= first) total[i / 2 % 2] += g(i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPairsOfThread; ++i) total[i / 2 % 2] += g(i);
    }
    const bool is_cut = (cuts & kLanesOfHorizon << lane % 4) != 0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float of_all = over_row(total[row], plus);
      if (!is_cut && horizon[8 * row] >= q0) sum[row] += of_all;
    }
    if (cuts == 0) return;
#pragma unroll 1
    for (int h = 0; h < kMaxHorizons; ++h) {
      if (!(cuts & kLanesOfHorizon << h)) continue;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int32_t first = position[8 * row] - shift;
        const int32_t last = table.horizon[h][key + 8 * row] - shift;
        float part = 0;
#pragma unroll
        for (int i = 2 * row; i < kPairsOfThread; i += 4) {
#pragma unroll
          for (int x = i; x < i + 2; ++x) {
            if (query_of(x) >= first && query_of(x) <= last) part += g(x);
          }
        }
        part = over_row(part, plus);
        if (lane % 4 == h) sum[row] += part;
      }
    }
  }

  template <int kConsumers>
  __device__ void write(const KeyParallelArguments& a, const KeyTable<kConsumers>& table,
                        int32_t key) const {
    const int32_t h = threadIdx.x % 4;
    if (h >= a.horizon_count) return;
    const int64_t plane = int64_t{a.batch} * a.kv_heads * a.tokens;
    const int64_t head = int64_t{table.batch} * a.kv_heads + table.kv_head;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t position = table.position[key + 8 * row];
      if (position != kNoPosition) {
        a.role_sums[h * plane + head * a.tokens + position] = sum[row];
      }
    }
  }
};

// Number of the first of a consumer thread's two keys, 8 apart, among the block's.
__device__ inline int32_t first_key_of_thread() {
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kWarpgroupThreads;
  return thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
}

// Zeros for a span past the length, by all consumers.
template <int kConsumers>
__device__ inline void write_no_role_sums(const KeyParallelArguments& a,
                                          const KeyTable<kConsumers>& table) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kWarpgroupThreads;
  const int64_t head = int64_t{table.batch} * a.kv_heads + table.kv_head;
  const int64_t plane = int64_t{a.batch} * a.kv_heads * a.tokens;
  for (int32_t place = table.span.begin + thread; place < table.span.end;
       place += kConsumers * kWarpgroupThreads) {
    for (int32_t h = 0; h < a.horizon_count; ++h) {
      a.role_sums[h * plane + head * a.tokens + place] = 0;
    }
  }
}

template <class Config>
__device__ inline void init_key_parallel_barriers(typename Config::Shared& shared) {
  constexpr uint32_t kConsumerWarps = Config::kConsumers * (kWarpgroupThreads / kWarpThreads);
  for (int stage = 0; stage < Config::kStages; ++stage) {
    barrier_init(shared.full[stage], 1);
    barrier_init(shared.empty[stage], kConsumerWarps);
  }
  for (int t = 0; t < kTables; ++t) {
    barrier_init(shared.full_table[t], 1);
    barrier_init(shared.empty_table[t], kConsumerWarps);
  }
  if constexpr (!Config::kKeysByStage) {
    for (int buffer = 0; buffer < Config::kKeyBuffers; ++buffer) {
      barrier_init(shared.full_keys[buffer], 1);
      barrier_init(shared.empty_keys[buffer], kConsumerWarps);
    }
  }
  fence_barrier_init();
}

// Calls do_block(table) for every block of keys, for a consumer.
template <class Shared, class DoBlock>
__device__ inline void for_each_table(Shared& shared, const DoBlock& do_block) {
  for (RingPosition<kTables> ring;; ring.advance()) {
    const int32_t t = ring.stage;
    barrier_wait(shared.full_table[t], ring.parity);
    if (shared.table[t].batch < 0) return;
    do_block(shared.table[t]);
    __syncwarp();
    hand_back(shared.empty_table[t]);
  }
}

// Consumer_: of a config.
template <class Config_, template <class> class Consumer_>
struct KeyParallelKernel {
  using Config = Config_;
  using Producer = KeyParallelProducer<Config>;
  using Consumer = Consumer_<Config>;
  __device__ static void init_barriers(typename Config::Shared& shared) {
    init_key_parallel_barriers<Config>(shared);
  }
};

template <class Config, template <class> class Consumer>
void launch_key_parallel(const KeyParallelArguments& arguments, int multiprocessors,
                         CUstream_st* stream) {
  launch_warp_roles<KeyParallelKernel<Config, Consumer>>(arguments, arguments.items,
                                                         multiprocessors, stream);
}

}  // namespace natslm::kernels::sm90
