// Attention over short texts of which most keys live: the Hopper forward kernel with a producer
// that needs no plan. It reads every key up to the query tile's last, in position order, so one
// launch is all there is; query tiles are dealt out beforehand, and Q, K, V and `last` of the next
// tile are under way while the consumers work on this one, across the ends of query tiles.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/sm90/attention_forward.cuh"
#include "natslm/kernels/sm90/attention_whole.h"

namespace natslm::kernels::sm90 {

// A query tile of a block, and where in its keys the producer is.
struct WholeStep {
  int32_t round = -1;
  QueryTile tile{};
  QueryRange range{};
  int32_t begin = 0, end = 0;  // the tile's keys from `begin` on; a tile of keys may be read past
                               // the last query, but never past the length

  __device__ bool is_first() const { return begin == 0; }
  __device__ bool is_last() const { return begin + kTileKeys >= end; }
  __device__ bool reads_keys() const { return end > 0; }

  // The next one that reads keys, or that there is at all if it reads none; false at the end.
  __device__ bool advance(const WholeArguments& a) {
    if (round >= 0 && !is_last()) {
      begin += kTileKeys;
      return true;
    }
    const auto blocks = static_cast<int32_t>(gridDim.x);
    int32_t item;
    do {
      ++round;
      item = dealt_item(round, static_cast<int32_t>(blockIdx.x), blocks);
    } while (item >= a.work_items && round * blocks < a.work_items);
    if (item >= a.work_items) return false;
    const cuda::HeadSpan at = cuda::head_span(item, a.heads, a.tiles, a.heads_together);
    tile = query_tile(a, at.head * a.tiles + a.tiles - 1 - at.span);
    range = {at.head, tile.first_query, min(tile.first_query + a.tile_queries, tile.length) - 1};
    const int32_t keys = range.q1 < range.q0 ? 0 : range.q1 + 1;
    begin = 0;
    end = min((keys + kTileKeys - 1) / kTileKeys * kTileKeys, tile.length);
    tile.sees_keys = reads_keys();
    return true;
  }

  // Lane l sees to keys 4 l .. 4 l + 3 of a tile of keys.
  __device__ Piece piece_of_lane(int32_t lane) const {
    const int32_t first = begin + lane / 4 * kPieceKeys, limit = first + kPieceKeys;
    if (first >= end) return kPadding;
    return {limit > tile.length ? tile.length - kPieceKeys : first, first, min(limit, end)};
  }
  __device__ TileKeys kind() const {
    return begin + kTileKeys <= end ? TileKeys::kContiguous : TileKeys::kMixed;
  }
};

template <class Config>
struct WholeProducer : Producer<Config> {
  const WholeArguments& whole;

  __device__ WholeProducer(const WholeArguments& arguments, typename Config::Shared& s, int32_t l)
      : Producer<Config>{arguments, s, l}, whole(arguments) {}

  struct Lasts {
    int32_t of[4];
  };
  // Waits for nothing: what comes back is first needed a tile later.
  __device__ Lasts ask_for_lasts(const WholeStep& step) const {
    const Piece piece = step.piece_of_lane(this->lane);
    const int32_t* last = whole.last + int64_t{step.range.head} * whole.tokens;
    Lasts lasts;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t place = piece.row + this->lane % 4 * 4 + i;
      lasts.of[i] = place >= piece.first && place < piece.end ? last[place] : -1;
    }
    return lasts;
  }

  __device__ uint32_t write_lifetimes(const WholeStep& step, const Piece& piece,
                                      const Lasts& lasts) {
    const int32_t stage = this->ring.stage;
    bool seen = true;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t position = piece.row + this->lane % 4 * 4 + i;
      seen = seen && position <= step.range.q0 && lasts.of[i] >= step.range.q1;
      this->shared.position[stage][4 * this->lane + i] = position;
      this->shared.last[stage][4 * this->lane + i] = lasts.of[i];
    }
    const uint32_t pieces = __popc(__ballot_sync(~0u, piece.first < piece.end)) / 4;
    return pieces_to_test(__ballot_sync(~0u, seen)) | piece_count(pieces) |
           (step.is_last() ? kLastKeyTile : 0);
  }

  __device__ void load_keys(const WholeStep& step, const Lasts& lasts) {
    const int32_t stage = this->ring.stage;
    const Piece piece = step.piece_of_lane(this->lane);
    uint64_t& full_k = this->shared.full_k[stage];
    barrier_wait(this->shared.empty_k[stage], this->ring.parity ^ 1);
    if (this->lane == 0) barrier_expect_bytes(full_k, this->kMatrixBytes);
    __syncwarp();
    this->load_matrix(this->shared.k[stage], whole.k, whole.k_piece, full_k, step.kind(), piece.row,
                      step.tile);
    const uint32_t flags = write_lifetimes(step, piece, lasts);
    if (this->lane == 0) this->shared.flags[stage] = flags;
    __syncwarp();
    if (this->lane == 0) barrier_arrive(full_k);
    this->load_v(piece, step.kind(), step.tile);
    this->ring.advance();
  }

  __device__ void run() {
    WholeStep step;
    bool more = step.advance(whole);
    Lasts lasts = ask_for_lasts(step);
    while (more) {
      WholeStep next = step;
      more = next.advance(whole);
      const Lasts next_lasts = ask_for_lasts(next);
      if (step.is_first()) this->load_q(step.tile);
      if (step.reads_keys()) load_keys(step, lasts);
      step = next;
      lasts = next_lasts;
    }
    this->load_q({-1, 0, 0, 0, false});
  }
};

template <int kHeadDim, int kRows>
struct WholeKernel {
  struct Config : ForwardConfig<kHeadDim, kRows / 64, /*kQueryStages=*/2> {
    using Arguments = WholeArguments;
  };
  using Producer = WholeProducer<Config>;
  using Consumer = sm90::Consumer<Config>;
  __device__ static void init_barriers(typename Config::Shared& shared) {
    init_tile_barriers<Config>(shared);
  }
};

template <int kHeadDim, int kRows>
void launch_attention_whole(const WholeArguments& arguments, int multiprocessors,
                            CUstream_st* stream) {
  launch_warp_roles<WholeKernel<kHeadDim, kRows>>(arguments, arguments.work_items, multiprocessors,
                                                  stream);
}

}  // namespace natslm::kernels::sm90
