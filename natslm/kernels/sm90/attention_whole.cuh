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
// Where there are few query tiles, the time is that of the one with most keys. Then the consumers
// of a team share the same 64 rows and take its tiles of keys in turn (kParts), each with a softmax
// and an output of its own, which the first of them puts together at the end.
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

// Where a row of a query tile lies in the output, relative to the tile's first query and head.
struct alignas(16) OutputRow {
  int64_t elements;
  int32_t query;  // far beyond any text where the tile does not use the row
};

// What a part of a query tile's keys comes to, of one row pair of each thread of a warpgroup.
template <int kHeadDim>
struct alignas(16) PartialOutput {
  float out[kHeadDim / 8][kWarpgroupThreads][4];
  float reference[2][kWarpgroupThreads], sum[2][kWarpgroupThreads];
};

// Of all parts but the first.
template <int kHeadDim, int kParts>
struct PartialOutputs {
  PartialOutput<kHeadDim> of[kParts - 1];
};
template <int kHeadDim>
struct PartialOutputs<kHeadDim, 1> {};

template <int kHeadDim_, int kRows_, int kParts_>
struct WholeConfig {
  using Arguments = WholeArguments;
  using Element = __nv_bfloat16;
  static constexpr int kHeadDim = kHeadDim_, kHalves = kHeadDim / kSwizzleColumns;
  static constexpr int kRows = kRows_, kParts = kParts_;  // of a team
  static constexpr int kConsumers = kRows / 64 * kParts;  // likewise
  static constexpr int kTeams = whole_teams(kHeadDim, kRows, kParts);
  static constexpr int kWarpgroups = kTeams * kConsumers + 1;
  static_assert(kParts == 1 || kRows == 64);
  // A stage always goes to the same part.
  static_assert((kParts & (kParts - 1)) == 0);
  static constexpr int kThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kProducerRegisters = kWarpgroups == 5 ? 24 : kWarpgroups == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters =
      (register_pool(kWarpgroups) - kProducerRegisters) / (kWarpgroups - 1) / 8 * 8;
  static constexpr int kQueryStages = 2;
  static constexpr int kStages = kRows == 64 ? 2 * kParts : kRows == 128 ? 4 : 3;  // of K and of V
  static constexpr bool kLoadsDout = false;

  struct alignas(kSwizzleBytes) Shared {  // of a team
    // Becomes the output's, row by row, once its rows have met all their keys.
    Element q[kQueryStages][kHalves][kRows][kSwizzleColumns];
    TileHalf k[kStages][kHalves];
    TileHalf v[kStages][kHalves];
    // With the keys of a stage. -1: no key of this tile.
    alignas(16) int32_t last[kStages][kTileRows];
    alignas(16) float bias[4 * kConsumers][kTileRows];  // of a warp, for the tile it works on
    QueryTile query_tile[kQueryStages];                 // belongs to whoever owns its part of q
    OutputRow output_row[kRows];
    PartialOutputs<kHeadDim, kParts> partial;
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

// A position of a consumer in the ring of stages: it takes every kParts-th.
template <class Config>
struct PartRing {
  int32_t stage;
  uint32_t parity = 0;
  __device__ void advance() {
    stage += Config::kParts;
    if (stage >= Config::kStages) {
      stage -= Config::kStages;
      parity ^= 1;
    }
  }
};

template <class Config>
struct WholeConsumer : Consumer<Config> {
  static constexpr int kParts = Config::kParts;
  using Base = Consumer<Config>;
  using Output = float[Config::kHeadDim / 2];
  using Base::a, Base::shared;
  const int32_t part;            // of the keys
  const uint32_t first_barrier;  // of the team, among the hardware's
  PartRing<Config> ring, v_ring;
  int32_t next_tile;         // of the next query tile's tiles of keys, this part's first
  bool has_written = false;  // a partial output that may still be read
  const int32_t lane = threadIdx.x % kWarpThreads;
  // Of the team's consumers, and of the warpgroup's rows.
  const int32_t warp_of_warpgroup =
      __shfl_sync(~0u, static_cast<int32_t>(threadIdx.x) % kWarpgroupThreads / kWarpThreads, 0);
  const int32_t warp, first_row;
  int32_t last_query_of_warpgroup, first_query_of_warp, last_query_of_warp;  // of a tile's

  // consumer: its number in the team.
  __device__ WholeConsumer(const WholeArguments& arguments, typename Config::Shared& s,
                           int32_t team, int32_t consumer)
      : Base(arguments, s, consumer / kParts),
        part(consumer % kParts),
        first_barrier(1 + team * kBarriers),
        ring{part},
        v_ring{part},
        next_tile(part),
        warp(4 * consumer + warp_of_warpgroup),
        first_row(64 * this->warpgroup + 16 * warp_of_warpgroup),
        last_query_of_warpgroup((64 * this->warpgroup + 63) / a.group),
        first_query_of_warp(first_row / a.group),
        last_query_of_warp((first_row + 15) / a.group) {
    if (part == 0 && lane < 16) {
      const int32_t row = first_row + lane, query = row / a.group, head = row - query * a.group;
      const bool is_used = query < a.tile_queries;
      shared.output_row[row] = {query * a.out_stride.token + head * a.out_stride.head,
                                is_used ? query : 1 << 30};
    }
    __syncwarp();
  }

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
    const int32_t column = lane % 4 * 2;
    if (to_drop) {
      auto& bias = shared.bias[warp];
      __syncwarp();
      *reinterpret_cast<float2*>(&bias[2 * lane]) = {none[0] ? -INFINITY : 0.0f,
                                                     none[1] ? -INFINITY : 0.0f};
      __syncwarp();
#pragma unroll
      for (int block = 0; block < kTileRows / 8; ++block) {
        const float2 b = *reinterpret_cast<const float2*>(&bias[8 * block + column]);
        scores[4 * block] += b.x;
        scores[4 * block + 1] += b.y;
        scores[4 * block + 2] += b.x;
        scores[4 * block + 3] += b.y;
      }
    }
    if (!to_test) return;
#pragma unroll
    for (int piece = 0; piece < kTileRows / 16; ++piece) {
      if (!(to_test >> (8 * piece) & 0xff)) continue;
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

  // Scores of key tile t.
  __device__ void finish_scores(PairRegisters& scores, int32_t t, const QueryTile& tile,
                                const Rows& rows) {
    fence_registers(scores);
    hide(scores, key_row(t * kTileRows, tile.length), rows);
    ring.advance();
  }

  __device__ void attend(const QueryTile& tile, Softmax& softmax, Output& out) {
    const int32_t keys = keys_of(tile, a.tile_queries), all = key_tiles_of(keys);
    const auto position_of = [&](int32_t query) { return min(tile.first_query + query, keys - 1); };
    const int32_t mine = kParts > 1 ? all : key_tiles_of(position_of(last_query_of_warpgroup) + 1);
    const Rows rows = {{tile.first_query + this->offset[0], tile.first_query + this->offset[1]},
                       position_of(first_query_of_warp),
                       position_of(last_query_of_warp)};
    const uint64_t q = matrix_descriptor(shared.q[this->q_ring.stage][0][64 * this->warpgroup]);
    int32_t t = next_tile;
    next_tile = (next_tile - all) & (kParts - 1);
    if (kParts > 1 && t >= mine) return;
    uint32_t probabilities[kPairsOfThread / 2];
    float factor[2];
    {
      PairRegisters scores;
      barrier_wait(shared.full_k[ring.stage], ring.parity);
      start_scores(scores, q);
      wgmma_wait<0>();
      finish_scores(scores, t, tile, rows);
      softmax.update(scores, factor);
      round_pairs(probabilities, scores);
    }
    // The scores of a tile are multiplied while the exponentials of the tile before are turned into
    // output.
    for (t += kParts; t < mine; t += kParts) {
      PairRegisters scores;
      barrier_wait(shared.full_k[ring.stage], ring.parity);
      start_scores(scores, q);
      start_output(out, probabilities);

      wgmma_wait<1>();
      finish_scores(scores, t, tile, rows);
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
    for (t = mine; kParts == 1 && t < all; ++t) {
      barrier_wait(shared.full_k[ring.stage], ring.parity);
      barrier_wait(shared.full_v[ring.stage], ring.parity);
      ring.advance();
      hand_back_keys();
    }
  }

  // Of a team: one for the rows of each 64, and with several parts two more.
  static constexpr uint32_t kBarriers = Config::kRows / 64 + (kParts > 1 ? 2 : 0);
  static_assert(Config::kTeams * kBarriers < 16);
  static constexpr uint32_t kTeamThreads = Config::kConsumers * kWarpgroupThreads;
  __device__ uint32_t partials_written() const {
    return first_barrier + 1;
  }
  __device__ uint32_t partials_read() const {
    return first_barrier + 2;
  }

  // What this part has come to, for the first one; waits until it has read the one before.
  __device__ void write_partial(const Softmax& softmax, const Output& out) {
    if (has_written) named_barrier_sync(partials_read(), kTeamThreads);
    has_written = true;
    auto& to = shared.partial.of[part - 1];
    const int32_t thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 8; ++i) {
      *reinterpret_cast<float4*>(to.out[i][thread]) = {out[4 * i], out[4 * i + 1], out[4 * i + 2],
                                                       out[4 * i + 3]};
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      to.reference[row][thread] = softmax.reference[row];
      to.sum[row][thread] = softmax.sum[row];
    }
    named_barrier_arrive(partials_written(), kTeamThreads);
  }

  // Adds the other parts to what this one, the first, has come to.
  __device__ void add_partials(Softmax& softmax, Output& out) {
    named_barrier_sync(partials_written(), kTeamThreads);
    const int32_t thread = threadIdx.x % kWarpgroupThreads;
    float factor[kParts][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float largest = softmax.reference[row];
      for (const auto& from : shared.partial.of) {
        largest = fmaxf(largest, from.reference[row][thread]);
      }
      const float offset = largest == -INFINITY ? 0 : largest;
      factor[0][row] = exp2_fast((softmax.reference[row] - offset) * softmax.scale_log2);
      float sum = softmax.sum[row] * factor[0][row];
#pragma unroll
      for (int i = 1; i < kParts; ++i) {
        const auto& from = shared.partial.of[i - 1];
        factor[i][row] = exp2_fast((from.reference[row][thread] - offset) * softmax.scale_log2);
        sum = fmaf(from.sum[row][thread], factor[i][row], sum);
      }
      softmax.reference[row] = largest;
      softmax.sum[row] = sum;
    }
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 2; ++i) out[i] *= factor[0][i / 2 % 2];
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
#pragma unroll
      for (int block = 0; block < Config::kHeadDim / 8; ++block) {
        const float4 x =
            *reinterpret_cast<const float4*>(shared.partial.of[i - 1].out[block][thread]);
        out[4 * block] = fmaf(x.x, factor[i][0], out[4 * block]);
        out[4 * block + 1] = fmaf(x.y, factor[i][0], out[4 * block + 1]);
        out[4 * block + 2] = fmaf(x.z, factor[i][1], out[4 * block + 2]);
        out[4 * block + 3] = fmaf(x.w, factor[i][1], out[4 * block + 3]);
      }
    }
    named_barrier_arrive(partials_read(), kTeamThreads);
  }

  // Output and log-sum-exp of the warpgroup's rows. They go through Q's memory, so that each row
  // is written by lanes that lie side by side.
  __device__ void store(const QueryTile& tile, Output& out, const Softmax& softmax) {
    float sum[2], inverse[2];
    bool sees[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = over_row(softmax.sum[i], [](float x, float y) { return x + y; });
      sees[i] = tile.first_query + this->offset[i] < tile.length && sum[i] != 0;
      inverse[i] = __fdividef(1, sum[i]);
    }
    if (__any_sync(~0u, !sees[0] || !sees[1])) {
#pragma unroll
      for (int i = 0; i < Config::kHeadDim / 2; ++i) {
        if (!sees[i / 2 % 2]) out[i] = inverse[i / 2 % 2] = 0;
      }
    }
    auto& rows = shared.q[this->q_ring.stage];
    constexpr uint32_t kHalf = sizeof(rows[0]), kRow = sizeof(rows[0][0]);
    const uint32_t first = shared_address(rows[0][first_row]);
    // The last multiplications by Q may still be at work for other warps.
    named_barrier_sync(first_barrier + this->warpgroup, kWarpgroupThreads);
    const uint32_t mine = first + lane % 16 * kRow + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const float* x = out + 8 * i;
      const uint32_t words[4] = {
          pack_bfloat16(x[0] * inverse[0], x[1] * inverse[0]),
          pack_bfloat16(x[2] * inverse[1], x[3] * inverse[1]),
          pack_bfloat16(x[4] * inverse[0], x[5] * inverse[0]),
          pack_bfloat16(x[6] * inverse[1], x[7] * inverse[1]),
      };
      store_matrices((mine + i / 4 * kHalf) ^ (i % 4 << 5), words);
    }
    __syncwarp();
    __nv_bfloat16* const to = a.out + tile.batch * a.out_stride.batch +
                              tile.kv_head * a.group * a.out_stride.head +
                              tile.first_query * a.out_stride.token + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t row = lane / 8 + 4 * i;
      const OutputRow at = shared.output_row[first_row + row];
      if (tile.first_query + at.query >= a.tokens) continue;
#pragma unroll
      for (int half = 0; half < Config::kHalves; ++half) {
        uint32_t words[4];
        load_16_bytes(words, first + half * kHalf + row * kRow + ((lane % 8 ^ row % 8) << 4));
        store_16_bytes(to + at.elements + half * kSwizzleColumns, words);
      }
    }
    fence_async_proxy();
    __syncwarp();
    this->hand_back(shared.empty_q[this->q_ring.stage]);

    // Lane r of the first two of a quad writes row r's. (Registers have no addresses: no index.)
    const bool second = lane % 2 != 0;
    const int32_t query = second ? this->offset[1] : this->offset[0];
    const int32_t position = tile.first_query + query;
    if (lane % 4 < 2 && query < a.tile_queries && position < a.tokens) {
      const int32_t q_head = tile.kv_head * a.group + (second ? this->head[1] : this->head[0]);
      const float reference = second ? softmax.reference[1] : softmax.reference[0];
      a.lse[(int64_t{tile.batch} * a.kv_heads * a.group + q_head) * a.tokens + position] =
          (second ? sees[1] : sees[0]) ? fmaf(reference, a.scale, logf(second ? sum[1] : sum[0]))
                                       : -INFINITY;
    }
  }

  __device__ void run() {
    for (;; this->q_ring.advance()) {
      const int32_t stage = this->q_ring.stage;
      barrier_wait(shared.full_q[stage], this->q_ring.parity);
      const QueryTile tile = shared.query_tile[stage];
      if (tile.batch < 0) break;
      Softmax softmax{a.scale_log2};
      Output out = {};
      if (tile.sees_keys) attend(tile, softmax, out);
      if constexpr (kParts > 1) {
        if (part > 0) {
          __syncwarp();
          this->hand_back(shared.empty_q[stage]);
          if (tile.sees_keys) write_partial(softmax, out);
          continue;
        }
        if (tile.sees_keys) add_partials(softmax, out);
      }
      store(tile, out, softmax);
    }
    if (has_written) named_barrier_sync(partials_read(), kTeamThreads);
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
        barrier_init(team.empty[stage], kConsumerWarps / Config::kParts);
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
    WholeConsumer<Config>(arguments, shared[team], team, consumer - team * Config::kConsumers)
        .run();
  }
}

template <int kHeadDim, int kRows, int kParts>
void launch_attention_whole(const WholeArguments& arguments, int multiprocessors,
                            CUstream_st* stream) {
  using Config = WholeConfig<kHeadDim, kRows, kParts>;
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
