// Attention over keys with lifetimes on Hopper: online softmax over tiles of keys, as in
// FlashAttention-3 (Shah et al. 2024), where only the runs of keys that a query tile sees are read.
//
// A block stays on its multiprocessor and takes query tiles from a list, longest first. One warp
// (the producer) finds the keys of a tile and has TMA bring Q, K and V; each consumer warpgroup
// works on 64 rows. Rows are position-major: row = (position - first) * group + head in the group.
//
// Every wait has its counterpart: the producer fills stage after stage in the order in which the
// consumers read them, and consumers hand back every stage, and every Q, exactly once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/attention_forward.config.cuh"
#include "natslm/kernels/sm90/attention_forward.h"
#include "natslm/kernels/sm90/softmax.cuh"
#include "natslm/kernels/sm90/warp_roles.cuh"

namespace natslm::kernels::sm90 {

// Position in a ring of stages, and the parity of the phase of its barriers.
template <int kStages>
struct RingPosition {
  int32_t stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- Producer: one warp; all lanes hold the same values unless said otherwise. ----

struct QueryRange {
  int32_t head;  // b * Hkv + h
  int32_t q0, q1;
};

__device__ inline QueryTile query_tile(const ForwardArguments& a, int32_t item) {
  const int32_t head = item / a.tiles, batch = head / a.kv_heads;
  return {batch, head - batch * a.kv_heads, (item - head * a.tiles) * a.tile_queries,
          a.lengths ? a.lengths[batch] : a.tokens, false};
}

// The three runs of a tile in a KeyOrder.
struct OrderedRuns {
  const KeyRun* runs;
  int32_t taken = 0;
  __device__ bool next(KeyRun& run) {
    if (taken == KeyOrder::kSegments) return false;
    run = runs[taken++];
    return true;
  }
};

// Position order: runs of blocks of keys that are not dead; none for a tile past the length
// (q1 < q0). Lane l judges block `first_block` + l.
struct LiveRuns {
  const ForwardArguments& a;
  int32_t head, q0, q1, length, lane;
  int32_t first_block = -32;
  BlockGroup group{};

  __device__ bool next(KeyRun& run) {
    while (group.live == 0) {
      first_block += 32;
      if (q1 < q0 || first_block * cuda::kBoundKeys > q1) return false;
      Tile kind = Tile::kDead;
      const int32_t block = first_block + lane, k0 = block * cuda::kBoundKeys;
      if (k0 <= q1) {
        const int32_t k1 = min(k0 + cuda::kBoundKeys, length) - 1;
        const int32_t blocks = (a.tokens + cuda::kBoundKeys - 1) / cuda::kBoundKeys;
        const int64_t index = int64_t{head} * blocks + block;
        kind = classify(q0, q1, k0, k1, a.min_last[index], a.max_last[index]);
      }
      group.live = __ballot_sync(~0u, kind != Tile::kDead);
      group.full = __ballot_sync(~0u, kind == Tile::kFull);
    }
    run = take_blocks(group, first_block, q1 + 1);
    return true;
  }
};

// Also that of the gradient of the queries, whose query tiles bring dout beside Q.
template <class Config>
struct Producer {
  using Shared = typename Config::Shared;
  const typename Config::Arguments& a;
  Shared& shared;
  const int32_t lane;
  RingPosition<Config::kStages> ring;
  RingPosition<Config::kQueryStages> q_ring;

  // Lane l sees to keys 4 l .. 4 l + 3 of a tile, which are in piece l / 4.
  template <class Source>
  __device__ Piece take_lane_piece(KeyCursor& cursor, Source& source, TileKeys kind,
                                   int32_t length) {
    const int32_t mine = lane / 4;
    if (kind != TileKeys::kMixed) {
      const int32_t row = cursor.row + mine * kPieceKeys;
      advance(cursor, source, kTileKeys);
      return {row, row, row + kPieceKeys};
    }
    Piece piece = kPadding;
#pragma unroll 1
    for (int p = 0; p < kTilePieces; ++p) {
      const Piece next = take_piece(cursor, source, length);
      if (p == mine) piece = next;
    }
    return piece;
  }

  // Writes position and last of the lane's keys to the stage. Returns the flags of the tile.
  __device__ uint32_t load_lifetimes(const Piece& piece, const QueryRange& range) {
    const int64_t head_offset = int64_t{range.head} * a.tokens;
    int32_t position[4], last[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t place = piece.row + lane % 4 * 4 + i;
      const bool counts = place >= piece.first && place < piece.end;
      last[i] = counts ? a.last[head_offset + place] : -1;
      position[i] = counts && a.position ? a.position[head_offset + place] : place;
    }
    bool seen = true;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      seen = seen && position[i] <= range.q0 && last[i] >= range.q1;
      shared.position[ring.stage][4 * lane + i] = position[i];
      shared.last[ring.stage][4 * lane + i] = last[i];
    }
    const uint32_t pieces = __popc(__ballot_sync(~0u, piece.first < piece.end)) / 4;
    return pieces_to_test(__ballot_sync(~0u, seen)) | piece_count(pieces);
  }

  // One matrix of a stage. The barrier counts kTileKeys rows whatever pieces they come in.
  __device__ void load_matrix(typename Config::Element (*to)[kTileKeys][kSwizzleColumns],
                              const CUtensorMap& whole, const CUtensorMap& piece, uint64_t& barrier,
                              TileKeys kind, int32_t piece_row, const QueryTile& tile) {
    if (kind != TileKeys::kMixed) {
      if (lane < Config::kHalves) {
        tma_load(to[lane], whole, barrier, lane * kSwizzleColumns, piece_row, tile.kv_head,
                 tile.batch);
      }
    } else {
      // Lane 8 h + p brings half h of piece p.
      const int32_t p = lane % kTilePieces, half = lane / kTilePieces;
      const int32_t row = __shfl_sync(~0u, piece_row, 4 * p);
      if (half < Config::kHalves) {
        tma_load(to[half][p * kPieceKeys], piece, barrier, half * kSwizzleColumns, row,
                 tile.kv_head, tile.batch);
      }
    }
  }
  static constexpr uint32_t kMatrixBytes = sizeof(Shared::k[0]);

  __device__ void load_k(const Piece& piece, TileKeys kind, bool is_last, const QueryTile& tile,
                         const QueryRange& range) {
    const int32_t stage = ring.stage;
    uint64_t& full = shared.full_k[stage];
    barrier_wait(shared.empty_k[stage], ring.parity ^ 1);
    if (lane == 0) barrier_expect_bytes(full, kMatrixBytes);
    __syncwarp();
    load_matrix(shared.k[stage], a.k, a.k_piece, full, kind, piece.row, tile);

    uint32_t flags = is_last ? kLastKeyTile : 0;
    flags |= kind == TileKeys::kFull ? piece_count(kTilePieces) : load_lifetimes(piece, range);
    if (lane == 0) shared.flags[stage] = flags;
    __syncwarp();
    if (lane == 0) barrier_arrive(full);
  }

  __device__ void load_v(const Piece& piece, TileKeys kind, const QueryTile& tile) {
    const int32_t stage = ring.stage;
    uint64_t& full = shared.full_v[stage];
    barrier_wait(shared.empty_v[stage], ring.parity ^ 1);
    if (lane == 0) barrier_expect_bytes(full, kMatrixBytes);
    __syncwarp();
    load_matrix(shared.v[stage], a.v, a.v_piece, full, kind, piece.row, tile);
    __syncwarp();
    if (lane == 0) barrier_arrive(full);
  }

  // Announces a query tile, and brings Q if it sees keys.
  __device__ void load_q(const QueryTile& tile) {
    const int32_t stage = q_ring.stage;
    uint64_t& full = shared.full_q[stage];
    barrier_wait(shared.empty_q[stage], q_ring.parity ^ 1);
    q_ring.advance();
    if (lane == 0) {
      shared.query_tile[stage] = tile;
      if (tile.sees_keys) {
        const uint32_t half_bytes = a.tile_queries * a.group * sizeof(shared.q[0][0][0]);
        barrier_expect_bytes(full, (Config::kLoadsDout ? 2 : 1) * Config::kHalves * half_bytes);
#pragma unroll
        for (int half = 0; half < Config::kHalves; ++half) {
          tma_load(shared.q[stage][half], a.q, full, half * kSwizzleColumns, 0, tile.first_query,
                   tile.kv_head, tile.batch);
          if constexpr (Config::kLoadsDout) {
            tma_load(shared.dout[stage][half], a.dout, full, half * kSwizzleColumns, 0,
                     tile.first_query, tile.kv_head, tile.batch);
          }
        }
      }
      barrier_arrive(full);
    }
    __syncwarp();
  }

  template <class Source>
  __device__ void load_query_tile(QueryTile tile, const QueryRange& range, Source source) {
    KeyCursor cursor = first_run(source);
    tile.sees_keys = !cursor.done;
    if (!tile.sees_keys) load_q(tile);
    // The first K before Q: a stage is free earlier than Q, which the tile before still reads.
    for (bool first = true; !cursor.done; first = false) {
      const TileKeys kind = tile_keys(cursor);
      const Piece piece = take_lane_piece(cursor, source, kind, tile.length);
      load_k(piece, kind, cursor.done, tile, range);
      if (first) load_q(tile);
      load_v(piece, kind, tile);
      ring.advance();
    }
  }

  // The consumers still have some stages of the item before to work on while this is fetched.
  __device__ int32_t next_item() {
    int32_t taken = 0;
    if (lane == 0) taken = atomicAdd(a.next_item, 1);
    return static_cast<int32_t>(gridDim.x) + __shfl_sync(~0u, taken, 0);
  }

  __device__ void run() {
    for (int32_t item = blockIdx.x; item < a.work_items; item = next_item()) {
      const QueryTile tile = query_tile(a, a.work[item]);
      const QueryRange range{tile.batch * a.kv_heads + tile.kv_head, tile.first_query,
                             min(tile.first_query + a.tile_queries, tile.length) - 1};
      if (a.runs) {
        const int64_t index = int64_t{range.head} * a.tiles + tile.first_query / a.tile_queries;
        load_query_tile(tile, range, OrderedRuns{a.runs + index * KeyOrder::kSegments});
      } else {
        load_query_tile(tile, range,
                        LiveRuns{a, range.head, range.q0, range.q1, tile.length, lane});
      }
    }
    load_q({-1, 0, 0, 0, false});
  }
};

// ---- Consumers: a warpgroup with 64 rows. A thread works on two of them, 8 apart. ----

// Scores of 64 rows against a key tile, one group of multiplications.
template <class Config>
__device__ inline void start_scores(float (&scores)[kTileKeys / 2], uint64_t q, uint64_t k) {
  constexpr uint32_t kQHalf = sizeof(Config::Shared::q[0][0]),
                     kKHalf = sizeof(Config::Shared::k[0][0]);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 16; ++step) {
    // 16 columns are 32 bytes of a row; four steps to a half.
    const uint32_t half = step / 4, offset = step % 4 * 32;
    wgmma_m64n128k16(scores, advance(q, half * kQHalf + offset), advance(k, half * kKHalf + offset),
                     step > 0);
  }
  wgmma_commit();
}

// out += probabilities * V for piece `step` of a key tile.
template <class Config>
__device__ inline void add_piece(float (&out)[Config::kHeadDim / 2],
                                 const uint32_t (&probabilities)[kTileKeys / 4], uint64_t v,
                                 int step) {
  static_assert(kPieceKeys == 16, "the depth of a multiplication");
  const uint64_t rows = advance(v, step * kPieceKeys * sizeof(Config::Shared::v[0][0][0]));
  if constexpr (Config::kHeadDim == 64) {
    wgmma_m64n64k16(out, probabilities + 4 * step, rows);
  } else {
    wgmma_m64n128k16(out, probabilities + 4 * step, rows);
  }
}

// out += probabilities * V, one group of multiplications.
template <class Config>
__device__ inline void start_output(float (&out)[Config::kHeadDim / 2],
                                    const uint32_t (&probabilities)[kTileKeys / 4], uint64_t v) {
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < kTilePieces; ++step) add_piece<Config>(out, probabilities, v, step);
  wgmma_commit();
}

// The same for the first `pieces`, as a last tile may hold few. (The compiler wants a begin around
// each multiplication that may be skipped.)
template <class Config>
__device__ inline void start_last_output(float (&out)[Config::kHeadDim / 2],
                                         const uint32_t (&probabilities)[kTileKeys / 4], uint64_t v,
                                         int pieces) {
#pragma unroll
  for (int step = 0; step < kTilePieces; ++step) {
    if (step < pieces) {
      wgmma_begin();
      add_piece<Config>(out, probabilities, v, step);
    }
  }
  wgmma_begin();
  wgmma_commit();
}

template <class Config>
struct Consumer {
  using Shared = typename Config::Shared;
  const ForwardArguments& a;
  Shared& shared;
  const int32_t warpgroup;  // 0 .. kConsumers - 1, the same value in all lanes
  RingPosition<Config::kStages> k_ring, v_ring;
  RingPosition<Config::kQueryStages> q_ring;
  int32_t offset[2], head[2];  // of the two rows: position - first, head in the group

  __device__ Consumer(const ForwardArguments& arguments, Shared& s, int32_t group)
      : a(arguments), shared(s), warpgroup(group) {
    const int32_t thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = 64 * warpgroup + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
      offset[i] = row / a.group;
      head[i] = row - offset[i] * a.group;
    }
  }

  // The warpgroups issue their multiplications in turn, so that one computes exponentials while the
  // tensor cores work for another.
  static constexpr uint32_t kTurnThreads = 2 * kWarpgroupThreads;
  __device__ void await_turn() {
    named_barrier_sync(1 + warpgroup, kTurnThreads);
  }
  __device__ void pass_turn() {
    const int32_t next = warpgroup + 1 == Config::kConsumers ? 0 : warpgroup + 1;
    named_barrier_arrive(1 + next, kTurnThreads);
  }

  // Each warp hands back for itself.
  __device__ void hand_back(uint64_t& empty) {
    if (threadIdx.x % kWarpThreads == 0) barrier_arrive(empty);
  }

  // Hides what is not visible in the scores of the stage's tile and hands the stage back, and Q
  // with the last one.
  __device__ uint32_t finish_scores(float (&scores)[kTileKeys / 2], const int32_t (&queries)[2]) {
    const int32_t stage = k_ring.stage;
    const uint32_t flags = shared.flags[stage];
    hide(scores, flags, shared.position[stage], shared.last[stage], queries);
    __syncwarp();
    hand_back(shared.empty_k[stage]);
    if (flags & kLastKeyTile) hand_back(shared.empty_q[q_ring.stage]);
    k_ring.advance();
    return flags;
  }

  __device__ void store(const QueryTile& tile, float (&out)[Config::kHeadDim / 2],
                        const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = over_row(softmax.sum[i], [](float x, float y) { return x + y; });
      const int32_t position = tile.first_query + offset[i];
      const int32_t q_head = tile.kv_head * a.group + head[i];
      const bool exists = offset[i] < a.tile_queries && position < a.tokens;
      const bool sees = position < tile.length && sum != 0;
      const float inverse = 1 / sum;
      __nv_bfloat16* row = a.out + tile.batch * a.out_stride.batch + q_head * a.out_stride.head +
                           position * a.out_stride.token;
      store_row(row, out, i, inverse, sees, exists);
      if (exists && threadIdx.x % 4 == 0) {
        a.lse[(int64_t{tile.batch} * a.kv_heads * a.group + q_head) * a.tokens + position] =
            sees ? fmaf(softmax.reference[i], a.scale, logf(sum)) : -INFINITY;
      }
    }
  }

  __device__ void attend(const QueryTile& tile, Softmax& softmax,
                         float (&out)[Config::kHeadDim / 2]) {
    const uint64_t q = matrix_descriptor(shared.q[q_ring.stage][0][64 * warpgroup]);
    const auto k = [&] { return matrix_descriptor(shared.k[k_ring.stage][0]); };
    const auto v = [&] {
      return matrix_descriptor(shared.v[v_ring.stage][0], sizeof(shared.v[0][0]));
    };
    const int32_t queries[2] = {tile.first_query + offset[0], tile.first_query + offset[1]};
    uint32_t probabilities[kTileKeys / 4];
    uint32_t flags;
    float factor[2];
    {
      float scores[kTileKeys / 2];
      barrier_wait(shared.full_k[k_ring.stage], k_ring.parity);
      start_scores<Config>(scores, q, k());
      wgmma_wait<0>();
      fence_registers(scores);
      flags = finish_scores(scores, queries);
      softmax.update(scores, factor);
      round_pairs(probabilities, scores);
    }
    // The scores of a tile are multiplied while the exponentials of the tile before are turned into
    // output.
    while (!(flags & kLastKeyTile)) {
      float scores[kTileKeys / 2];
      barrier_wait(shared.full_k[k_ring.stage], k_ring.parity);
      await_turn();
      start_scores<Config>(scores, q, k());
      barrier_wait(shared.full_v[v_ring.stage], v_ring.parity);
      start_output<Config>(out, probabilities, v());
      pass_turn();

      wgmma_wait<1>();
      fence_registers(scores);
      flags = finish_scores(scores, queries);
      softmax.update(scores, factor);

      wgmma_wait<0>();
      fence_registers(out);
      hand_back(shared.empty_v[v_ring.stage]);
      v_ring.advance();
      rescale(out, factor);
      round_pairs(probabilities, scores);
    }
    barrier_wait(shared.full_v[v_ring.stage], v_ring.parity);
    start_last_output<Config>(out, probabilities, v(), pieces_with_keys(flags));
    wgmma_wait<0>();
    fence_registers(out);
    hand_back(shared.empty_v[v_ring.stage]);
    v_ring.advance();
  }

  __device__ void run() {
    if (warpgroup == Config::kConsumers - 1) pass_turn();  // warpgroup 0 begins
    for (;; q_ring.advance()) {
      barrier_wait(shared.full_q[q_ring.stage], q_ring.parity);
      const QueryTile tile = shared.query_tile[q_ring.stage];
      if (tile.batch < 0) return;
      Softmax softmax{a.scale_log2};
      float out[Config::kHeadDim / 2] = {};
      if (tile.sees_keys) {
        attend(tile, softmax, out);
      } else {
        __syncwarp();
        hand_back(shared.empty_q[q_ring.stage]);
      }
      store(tile, out, softmax);
    }
  }
};

template <class Config>
__device__ inline void init_tile_barriers(typename Config::Shared& shared) {
  constexpr uint32_t kConsumerWarps = Config::kConsumers * (kWarpgroupThreads / kWarpThreads);
  for (int stage = 0; stage < Config::kQueryStages; ++stage) {
    barrier_init(shared.full_q[stage], 1);
    barrier_init(shared.empty_q[stage], kConsumerWarps);
  }
  for (int stage = 0; stage < Config::kStages; ++stage) {
    barrier_init(shared.full_k[stage], 1);
    barrier_init(shared.full_v[stage], 1);
    barrier_init(shared.empty_k[stage], kConsumerWarps);
    barrier_init(shared.empty_v[stage], kConsumerWarps);
  }
  fence_barrier_init();
}

template <int kHeadDim>
struct ForwardKernel {
  using Config = ForwardConfig<kHeadDim, forward_rows(kHeadDim) / 64, /*kQueryStages=*/1>;
  using Producer = sm90::Producer<Config>;
  using Consumer = sm90::Consumer<Config>;
  __device__ static void init_barriers(typename Config::Shared& shared) {
    init_tile_barriers<Config>(shared);
  }
};

template <int kHeadDim>
void launch_attention_forward(const ForwardArguments& arguments, int multiprocessors,
                              CUstream_st* stream) {
  launch_warp_roles<ForwardKernel<kHeadDim>>(arguments, arguments.work_items, multiprocessors,
                                             stream);
}

}  // namespace natslm::kernels::sm90
