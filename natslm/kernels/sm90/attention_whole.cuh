// Attention over short texts of which most keys live. It needs no plan: every key up to the query
// tile's last is read, in position order, so one launch is all there is.
//
// A block stays on its multiprocessor. It is made of teams: a producer warp and consumer warpgroups
// of 64 rows each, which work on query tiles that were dealt out to the team beforehand and know
// nothing of the other teams. The producer has TMA bring Q, K and V, and copies `last`, across the
// ends of query tiles: the next one's are under way while the consumers work on this one. Tiles of
// 64 keys leave registers for four consumers at head size 64, in two teams or more: one computes
// while another waits, so they need no turns.
//
// What a warp hides: keys that none of its 16 rows sees get a score of -inf by an addition (the
// adders have more room than the units that compare); only keys that some rows see and others do
// not are tested one by one, and those are few: the diagonal, and lifetimes that end here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/sm90/attention_forward.cuh"
#include "natslm/kernels/sm90/attention_whole.h"
#include "natslm/kernels/sm90/tile_products.cuh"

namespace natslm::kernels::sm90 {

template <int kHeadDim_, int kRows_>
struct WholeConfig {
  using Arguments = WholeArguments;
  using Element = __nv_bfloat16;
  static constexpr int kHeadDim = kHeadDim_, kHalves = kHeadDim / kSwizzleColumns;
  static constexpr int kRows = kRows_, kConsumers = kRows / 64;  // of a team
  static constexpr int kTeams = whole_teams(kHeadDim, kRows);
  static constexpr int kWarpgroups = kTeams * kConsumers + 1;
  static constexpr int kThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kProducerRegisters = kWarpgroups == 5 ? 24 : kWarpgroups == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters =
      (register_pool(kWarpgroups) - kProducerRegisters) / (kWarpgroups - 1) / 8 * 8;
  static constexpr int kQueryStages = 2;
  static constexpr int kStages = kRows == 64 ? 2 : kRows == 128 ? 4 : 3;  // of K and of V
  static constexpr bool kLoadsDout = false;

  struct alignas(kSwizzleBytes) Shared {  // of a team
    Element q[kQueryStages][kHalves][kRows][kSwizzleColumns];
    TileHalf k[kStages][kHalves];
    TileHalf v[kStages][kHalves];
    // With the keys of a stage. -1: no key of this tile.
    alignas(16) int32_t last[kStages][kTileRows];
    alignas(16) float bias[4 * kConsumers][kTileRows];  // of a warp, for the tile it works on
    QueryTile query_tile[kQueryStages];                 // belongs to whoever owns its part of q
    uint64_t full_q[kQueryStages], empty_q[kQueryStages];
    uint64_t full_k[kStages], full_v[kStages], empty[kStages];
  };
  static_assert(kTeams * sizeof(Shared) <= 227 * 1024,
                "what a block can have on compute capability 9.0");
};

// A team among all of the launch: those of the same number in all blocks come one after the other.
struct Team {
  int32_t number, teams;
};

// Keys of a query tile: all up to its last query.
__device__ inline int32_t keys_of(const QueryTile& tile, int32_t tile_queries) {
  return tile.first_query < tile.length ? min(tile.first_query + tile_queries, tile.length) : 0;
}
__device__ inline int32_t key_tiles_of(int32_t keys) {
  return (keys + kTileRows - 1) / kTileRows;
}
// Position of row 0 of the tile of keys from `begin` on. No row lies past the length: the last tile
// reads some keys a second time instead, and where the text is shorter than a tile, rows before its
// start (zeros).
__device__ inline int32_t key_row(int32_t begin, int32_t length) {
  return min(begin, length - kTileRows);
}

// A query tile of a team, and where in its keys the producer is.
struct WholeStep {
  int32_t round = -1;
  QueryTile tile{};
  int32_t begin = 0, keys = 0;

  __device__ bool is_first() const { return begin == 0; }
  __device__ bool is_last() const { return begin + kTileRows >= keys; }

  // The next one; false at the end. (A tile that sees no keys is one step.)
  __device__ bool advance(const WholeArguments& a, const Team& team) {
    if (round >= 0 && !is_last()) {
      begin += kTileRows;
      return true;
    }
    int32_t item;
    do {
      ++round;
      item = dealt_item(round, team.number, team.teams);
    } while (item >= a.work_items && round * team.teams < a.work_items);
    if (item >= a.work_items) return false;
    const cuda::HeadSpan at = cuda::head_span(item, a.heads, a.tiles, a.heads_together);
    tile = query_tile(a, at.head * a.tiles + a.tiles - 1 - at.span);
    begin = 0;
    keys = keys_of(tile, a.tile_queries);
    tile.sees_keys = keys > 0;
    return true;
  }
};

template <class Config>
struct WholeProducer : Producer<Config> {
  const WholeArguments& whole;
  const Team team;

  __device__ WholeProducer(const WholeArguments& arguments, typename Config::Shared& s, int32_t l,
                           const Team& t)
      : Producer<Config>{arguments, s, l}, whole(arguments), team(t) {}

  // Lane l sees to keys 2 l and 2 l + 1 of a tile.
  struct Lasts {
    int32_t of[2];
  };
  // Waits for nothing: what comes back is first needed a tile later.
  __device__ Lasts ask_for_lasts(const WholeStep& step) const {
    const QueryTile& tile = step.tile;
    const int32_t* last =
        whole.last + (int64_t{tile.batch} * whole.kv_heads + tile.kv_head) * whole.tokens;
    Lasts lasts;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t position = key_row(step.begin, tile.length) + 2 * this->lane + i;
      lasts.of[i] = position >= step.begin && position < step.keys ? last[position] : -1;
    }
    return lasts;
  }

  __device__ void load(typename Config::Element (*to)[kTileRows][kSwizzleColumns],
                       const CUtensorMap& map, uint64_t& barrier, const WholeStep& step) {
    constexpr uint32_t kBytes = Config::kHalves * sizeof(TileHalf);
    barrier_expect_bytes(barrier, kBytes);
#pragma unroll
    for (int half = 0; half < Config::kHalves; ++half) {
      tma_load(to[half], map, barrier, half * kSwizzleColumns,
               key_row(step.begin, step.tile.length), step.tile.kv_head, step.tile.batch);
    }
    barrier_arrive(barrier);
  }

  __device__ void load_keys(const WholeStep& step, const Lasts& lasts) {
    auto& shared = this->shared;
    const int32_t stage = this->ring.stage;
    barrier_wait(shared.empty[stage], this->ring.parity ^ 1);
    *reinterpret_cast<int2*>(&shared.last[stage][2 * this->lane]) = {lasts.of[0], lasts.of[1]};
    __syncwarp();
    if (this->lane == 0) {
      load(shared.k[stage], whole.k, shared.full_k[stage], step);
      load(shared.v[stage], whole.v, shared.full_v[stage], step);
    }
    this->ring.advance();
  }

  __device__ void run() {
    WholeStep step;
    bool more = step.advance(whole, team);
    Lasts lasts = more ? ask_for_lasts(step) : Lasts{};
    while (more) {
      WholeStep next = step;
      more = next.advance(whole, team);
      const Lasts next_lasts = more ? ask_for_lasts(next) : Lasts{};
      if (step.is_first()) this->load_q(step.tile);
      if (step.tile.sees_keys) load_keys(step, lasts);
      step = next;
      lasts = next_lasts;
    }
    this->load_q({-1, 0, 0, 0, false});
  }
};

template <class Config>
struct WholeConsumer : Consumer<Config> {
  using Base = Consumer<Config>;
  using Output = float[Config::kHeadDim / 2];
  using Base::a, Base::shared;
  RingPosition<Config::kStages> ring, v_ring;
  const int32_t lane = threadIdx.x % kWarpThreads;
  // Of the team's consumers; its rows are 16 * warp .. 16 * warp + 15.
  const int32_t warp =
      4 * this->warpgroup +
      __shfl_sync(~0u, static_cast<int32_t>(threadIdx.x) % kWarpgroupThreads / kWarpThreads, 0);

  __device__ WholeConsumer(const WholeArguments& arguments, typename Config::Shared& s,
                           int32_t warpgroup)
      : Base(arguments, s, warpgroup) {}

  struct Rows {
    int32_t queries[2];   // positions of the thread's two rows
    int32_t first, last;  // of the warp's
  };

  // Scores of pairs that are not visible become -inf. `position`: of the tile's row 0.
  __device__ void hide(PairRegisters& scores, int32_t position, const Rows& rows) {
    const auto& lasts = shared.last[ring.stage];
    const int2 mine = *reinterpret_cast<const int2*>(&lasts[2 * lane]);
    const int32_t p = position + 2 * lane;
    const auto seen_by_none = [&](int32_t at, int32_t last) {
      return at > rows.last || last < rows.first;
    };
    const auto seen_by_all = [&](int32_t at, int32_t last) {
      return at <= rows.first && last >= rows.last;
    };
    const bool none[2] = {seen_by_none(p, mine.x), seen_by_none(p + 1, mine.y)};
    const bool some =
        (!none[0] && !seen_by_all(p, mine.x)) || (!none[1] && !seen_by_all(p + 1, mine.y));
    const uint32_t to_test = __ballot_sync(~0u, some);  // byte i: keys 16 i .. 16 i + 15
    const uint32_t to_drop = __ballot_sync(~0u, none[0] || none[1]);
    if (!(to_test | to_drop)) return;
    auto& bias = shared.bias[warp];
    __syncwarp();
    *reinterpret_cast<float2*>(&bias[2 * lane]) = {none[0] ? -INFINITY : 0.0f,
                                                   none[1] ? -INFINITY : 0.0f};
    __syncwarp();
    const int32_t column = lane % 4 * 2;
#pragma unroll
    for (int piece = 0; piece < kTileRows / 16; ++piece) {
      if (to_test >> (8 * piece) & 0xff) {
#pragma unroll
        for (int block = 2 * piece; block < 2 * piece + 2; ++block) {
          const int32_t at = position + 8 * block + column;
          const int2 l = *reinterpret_cast<const int2*>(&lasts[8 * block + column]);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float* pair = scores + 4 * block + 2 * i;
            if (!visible(rows.queries[i], at, l.x)) pair[0] = -INFINITY;
            if (!visible(rows.queries[i], at + 1, l.y)) pair[1] = -INFINITY;
          }
        }
      } else if (to_drop >> (8 * piece) & 0xff) {
#pragma unroll
        for (int block = 2 * piece; block < 2 * piece + 2; ++block) {
          const float2 b = *reinterpret_cast<const float2*>(&bias[8 * block + column]);
          scores[4 * block] += b.x;
          scores[4 * block + 1] += b.y;
          scores[4 * block + 2] += b.x;
          scores[4 * block + 3] += b.y;
        }
      }
    }
  }

  __device__ void start_scores(PairRegisters& scores, uint64_t q) const {
    const uint64_t k = matrix_descriptor(shared.k[ring.stage][0]);
    constexpr uint32_t kQHalf = sizeof(shared.q[0][0]);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 16; ++step) {
      const uint32_t half = step / 4, offset = step % 4 * 32;
      wgmma_m64n64k16(scores, advance(q, half * kQHalf + offset),
                      advance(k, half * sizeof(TileHalf) + offset), step > 0);
    }
    wgmma_commit();
  }
  __device__ void start_output(Output& out, const uint32_t (&probabilities)[kPairsOfThread / 2]) {
    barrier_wait(shared.full_v[v_ring.stage], v_ring.parity);
    add_rows<Config::kHeadDim>(out, probabilities, channel_descriptor(shared.v[v_ring.stage]));
  }
  __device__ void hand_back_keys() {
    __syncwarp();
    this->hand_back(shared.empty[v_ring.stage]);
    v_ring.advance();
  }

  // Scores of key tile t of `tiles`: Q goes back with the last.
  __device__ void finish_scores(PairRegisters& scores, int32_t t, int32_t tiles,
                                const QueryTile& tile, const Rows& rows) {
    fence_registers(scores);
    if (t == tiles - 1) {
      __syncwarp();
      this->hand_back(shared.empty_q[this->q_ring.stage]);
    }
    hide(scores, key_row(t * kTileRows, tile.length), rows);
    ring.advance();
  }

  __device__ void attend(const QueryTile& tile, Softmax& softmax, Output& out) {
    const int32_t keys = keys_of(tile, a.tile_queries), all = key_tiles_of(keys);
    const auto position_of = [&](int32_t r) {
      return min(tile.first_query + r / a.group, keys - 1);
    };
    const int32_t mine = key_tiles_of(position_of(64 * this->warpgroup + 63) + 1);
    const Rows rows = {{tile.first_query + this->offset[0], tile.first_query + this->offset[1]},
                       position_of(16 * warp),
                       position_of(16 * warp + 15)};
    const uint64_t q = matrix_descriptor(shared.q[this->q_ring.stage][0][64 * this->warpgroup]);
    uint32_t probabilities[kPairsOfThread / 2];
    float factor[2];
    {
      PairRegisters scores;
      barrier_wait(shared.full_k[ring.stage], ring.parity);
      start_scores(scores, q);
      wgmma_wait<0>();
      finish_scores(scores, 0, mine, tile, rows);
      softmax.update(scores, factor);
      round_pairs(probabilities, scores);
    }
    // The scores of a tile are multiplied while the exponentials of the tile before are turned into
    // output.
    for (int32_t t = 1; t < mine; ++t) {
      PairRegisters scores;
      barrier_wait(shared.full_k[ring.stage], ring.parity);
      start_scores(scores, q);
      start_output(out, probabilities);

      wgmma_wait<1>();
      finish_scores(scores, t, mine, tile, rows);
      softmax.update(scores, factor);

      wgmma_wait<0>();
      fence_registers(out);
      hand_back_keys();
      rescale(out, factor);
      round_pairs(probabilities, scores);
    }
    start_output(out, probabilities);
    wgmma_wait<0>();
    fence_registers(out);
    hand_back_keys();
    // Keys that only later rows see.
    for (int32_t t = mine; t < all; ++t) {
      barrier_wait(shared.full_k[ring.stage], ring.parity);
      barrier_wait(shared.full_v[ring.stage], ring.parity);
      ring.advance();
      hand_back_keys();
    }
  }

  __device__ void run() {
    for (;; this->q_ring.advance()) {
      const int32_t stage = this->q_ring.stage;
      barrier_wait(shared.full_q[stage], this->q_ring.parity);
      const QueryTile tile = shared.query_tile[stage];
      if (tile.batch < 0) return;
      Softmax softmax{a.scale_log2};
      Output out = {};
      if (tile.sees_keys) {
        attend(tile, softmax, out);
      } else {
        __syncwarp();
        this->hand_back(shared.empty_q[stage]);
      }
      this->store(tile, out, softmax);
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    whole_kernel(const __grid_constant__ WholeArguments arguments) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Shared(*)[Config::kTeams]>(shared_bytes);
  constexpr int kConsumerWarps = Config::kConsumers * (kWarpgroupThreads / kWarpThreads);
  const int32_t warp = __shfl_sync(~0u, static_cast<int32_t>(threadIdx.x) / kWarpThreads, 0);
  cuda::admit_launch_behind();
  if (threadIdx.x == 0) {
    for (auto& team : shared) {
      for (int stage = 0; stage < Config::kQueryStages; ++stage) {
        barrier_init(team.full_q[stage], 1);
        barrier_init(team.empty_q[stage], kConsumerWarps);
      }
      for (int stage = 0; stage < Config::kStages; ++stage) {
        barrier_init(team.full_k[stage], 1);
        barrier_init(team.full_v[stage], 1);
        barrier_init(team.empty[stage], kConsumerWarps);
      }
    }
    fence_barrier_init();
  }
  __syncthreads();
  cuda::await_launch_before();
  if (warp < 4) {
    shrink_registers<Config::kProducerRegisters>();
    if (warp < Config::kTeams) {
      const int32_t lane = threadIdx.x % kWarpThreads;
      const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
      const Team team = {warp * blocks + block, Config::kTeams * blocks};
      WholeProducer<Config>(arguments, shared[warp], lane, team).run();
    }
  } else {
    grow_registers<Config::kConsumerRegisters>();
    const int32_t consumer = warp / 4 - 1, team = consumer / Config::kConsumers;
    WholeConsumer<Config>(arguments, shared[team], consumer - team * Config::kConsumers).run();
  }
}

template <int kHeadDim, int kRows>
void launch_attention_whole(const WholeArguments& arguments, int multiprocessors,
                            CUstream_st* stream) {
  using Config = WholeConfig<kHeadDim, kRows>;
  constexpr size_t kSharedBytes = Config::kTeams * sizeof(typename Config::Shared);
  const auto kernel = whole_kernel<Config>;
  NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kSharedBytes)));
  const int blocks =
      arguments.work_items < multiprocessors ? arguments.work_items : multiprocessors;
  cuda::launch_dependent(kernel, static_cast<unsigned>(blocks), Config::kThreads, kSharedBytes,
                         stream, arguments);
}

}  // namespace natslm::kernels::sm90
