// Gradients of keys and values on Hopper, over the pairs that are visible; in position order also
// the role sums, since scores and differences are at hand.
//
// A warpgroup owns 64 keys, whose gradients stay in its registers. For each tile of queries:
// S = K Q^T and dP = V dout^T, then dv += P dout and dk += dS Q with P and dS as left operands in
// registers. The scores of the next tile are issued behind the gradients of this one, so that the
// tensor cores have work while exponentials are computed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/attention_backward_stream.cuh"

namespace natslm::kernels::sm90 {

template <int kHeadDim_, bool kRoleSums_>
struct KeyGradientConfig {
  static_assert(!kRoleSums_ || brings_role_sums(kHeadDim_));
  using Arguments = KeyParallelArguments;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRoleSums = kRoleSums_;
  static constexpr bool kKeysByStage = false;
  static constexpr int kHalves = kHeadDim / kSwizzleColumns;
  // In a thread: kHeadDim for the gradients, 2 x 32 for scores and differences, 2 x 16 for P and
  // dS.
  static constexpr int kConsumers = 2;
  static constexpr int kStages = kHeadDim == 64 ? 8 : 4;
  // Head size 64 has room for the keys of the next block, which are then there when it begins.
  static constexpr int kKeyBuffers = kHeadDim == 64 ? 2 : 1;
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
  // Head size 128 takes all that its consumers can have; the producer then spills a few numbers,
  // once a block of keys.
  static constexpr int kProducerRegisters = kHeadDim == 64 ? 40 : 24;
  static constexpr int kConsumerRegisters = kHeadDim == 64 ? 232 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                register_pool(kConsumers + 1));

  using KeyTiles = __nv_bfloat16[kConsumers][kHalves][kWarpgroupKeys][kSwizzleColumns];
  struct alignas(kSwizzleBytes) Shared {
    KeyTiles k[kKeyBuffers], v[kKeyBuffers];
    QueryStage<kHeadDim> stage[kStages];
    alignas(128) TileTerms terms[kStages];
    KeyTable<kConsumers> table[kTables];
    uint64_t full[kStages], empty[kStages];
    uint64_t full_table[kTables], empty_table[kTables];
    uint64_t full_keys[kKeyBuffers], empty_keys[kKeyBuffers];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block can have on compute capability 9.0");
};

template <class Config>
struct KeyGradientConsumer {
  using Shared = typename Config::Shared;
  static constexpr int kHeadDim = Config::kHeadDim;
  using Gradient = float[kHeadDim / 2];
  using Table = KeyTable<Config::kConsumers>;

  const KeyParallelArguments& a;
  Shared& shared;
  const int32_t warpgroup;
  QueryWalk<Config::kStages> walk;
  RingPosition<Config::kKeyBuffers> key_ring;
  RoleSums sums;

  __device__ KeyGradientConsumer(const KeyParallelArguments& arguments, Shared& s, int32_t group)
      : a(arguments), shared(s), warpgroup(group) {}

  // A tile that is being worked on.
  struct Now {
    int32_t stage;
    int32_t q0;
    Tile visibility;
  };

  // Finishes the products of the tile in stage `before` (-1: none) and hands the stage back.
  __device__ void finish(int32_t& before) {
    wgmma_wait<0>();
    if (before >= 0) hand_back(shared.empty[before]);
    before = -1;
  }

  // Waits for the next tile in which pairs are visible, and hands the others back; of those, the
  // role sums may want their part. Stage `before` must not be held over tiles that are passed by:
  // the producer may need it for the tile that is waited for.
  __device__ bool next_tile(const Table& table, Now& now, int32_t& before) {
    const KeyBounds& bounds = table.bounds[warpgroup];
    for (; !walk.done(); walk.advance()) {
      now.stage = walk.ring.stage;
      barrier_wait(shared.full[now.stage], walk.ring.parity);
      now.q0 = walk.first_query();
      now.visibility = visibility_of(bounds, now.q0);
      if (now.visibility != Tile::kDead) {
        walk.advance();
        return true;
      }
      if (before >= 0) finish(before);
      if (Config::kRoleSums && adds_to_role_sums(bounds, now.q0)) add_hidden_tile(table, now);
      __syncwarp();
      hand_back(shared.empty[now.stage]);
    }
    return false;
  }

  // Role sums of a tile of which nothing is visible.
  __device__ void add_hidden_tile(const Table& table, const Now& now) {
    PairRegisters factor, difference;
    start_scores(factor, now);
    start_differences(difference, now);
    wgmma_wait<0>();
    fence_registers(factor);
    fence_registers(difference);
    const TileTerms& terms = shared.terms[now.stage];
    for_each_pair(terms.lse, [&](int i, float lse) {
      factor[i] = fminf(exp2_fast(fmaf(factor[i], a.scale_log2, -lse)), a.limit);
    });
    for_each_pair(terms.delta, [&](int i, float delta) { difference[i] -= delta; });
    sums.add(table, first_key_of_thread(), now.q0,
             [&](int i) { return factor[i] * difference[i]; });
  }

  __device__ void start_scores(PairRegisters& pairs, const Now& now) {
    start_pairs<kHeadDim>(pairs, matrix_descriptor(shared.k[key_ring.stage][warpgroup][0]),
                          matrix_descriptor(shared.stage[now.stage].q[0]));
  }
  __device__ void start_differences(PairRegisters& pairs, const Now& now) {
    start_pairs<kHeadDim>(pairs, matrix_descriptor(shared.v[key_ring.stage][warpgroup][0]),
                          matrix_descriptor(shared.stage[now.stage].dout[0]));
  }

  // How the thread's two keys stand to a tile of queries: where no key's life begins or ends inside
  // the tile, for any key of the warp, all pairs of a key are seen or none.
  struct Reading {
    bool mixed;        // for some key of the warp
    uint32_t seen[2];  // all bits or none; unless mixed
  };
  __device__ Reading reading_of(const Table& table, int32_t q0) const {
    Reading reading{};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t key = first_key_of_thread() + 8 * row;
      const int32_t position = table.position[key], last = table.last[key];
      const Tile one = classify(q0, q0 + kTileQueries - 1, position, position, last, last);
      reading.mixed |= one == Tile::kPartial;
      reading.seen[row] = one == Tile::kFull ? ~0u : 0;
    }
    reading.mixed = __any_sync(~0u, reading.mixed);
    return reading;
  }

  // Pairs that are not visible become 0. (A product with 0 would not do: a hidden pair's factor may
  // be infinite.)
  __device__ void hide(PairRegisters& pairs, const Reading& reading, const Table& table,
                       int32_t q0) const {
    if (reading.mixed) return for_hidden(table, q0, [&](int i) { pairs[i] = 0; });
#pragma unroll
    for (int i = 0; i < kPairsOfThread; ++i) pairs[i] = reading.seen[i / 2 % 2] ? pairs[i] : 0;
  }
  // The same of pairs that are rounded, two in a register.
  __device__ void hide(uint32_t (&rounded)[kPairsOfThread / 2], const Reading& reading,
                       const Table& table, int32_t q0) const {
    if (reading.mixed) {
      return for_hidden(table, q0,
                        [&](int i) { rounded[i / 2] &= i % 2 == 0 ? 0xffff0000u : 0xffffu; });
    }
#pragma unroll
    for (int i = 0; i < kPairsOfThread / 2; ++i) rounded[i] &= reading.seen[i % 2];
  }
  template <class Body>
  __device__ void for_hidden(const Table& table, int32_t q0, const Body& body) const {
    const int32_t shift = q0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t key = first_key_of_thread() + 8 * row;
      const int32_t first_seen = table.position[key] - shift, last_seen = table.last[key] - shift;
#pragma unroll
      for (int i = 2 * row; i < kPairsOfThread; i += 4) {
#pragma unroll
        for (int x = i; x < i + 2; ++x) {
          if (!visible(query_of(x), first_seen, last_seen)) body(x);
        }
      }
    }
  }

  __device__ void gather(const Table& table, Gradient& dk, Gradient& dv) {
    Now now;
    int32_t before = -1;  // stage of the tile before, whose products may not be finished
    if (!next_tile(table, now, before)) {
      hand_back(shared.empty_keys[key_ring.stage]);
      return;
    }
    PairRegisters factor, difference;
    uint32_t weights[kPairsOfThread / 2], products[kPairsOfThread / 2];
    fence_registers(dk);
    fence_registers(dv);
    start_scores(factor, now);
    for (;;) {
      const bool test = now.visibility == Tile::kPartial;
      const Reading reading = test ? reading_of(table, now.q0) : Reading{};
      const TileTerms& terms = shared.terms[now.stage];
      wgmma_wait<1>();  // all but the scores: weights and products before are free
      if (before >= 0) hand_back(shared.empty[before]);
      start_differences(difference, now);
      wgmma_wait<1>();  // the scores
      fence_registers(factor);
      for_each_pair(terms.lse, [&](int i, float lse) {
        factor[i] = exp2_fast(fmaf(factor[i], a.scale_log2, -lse));
      });
      if (Config::kRoleSums) {
        // Role sums want the factors of hidden pairs, too.
        round_pairs(weights, factor);
        if (test) hide(weights, reading, table, now.q0);
      } else {
        if (test) hide(factor, reading, table, now.q0);
        round_pairs(weights, factor);
      }
      fence_registers(weights);
      add_rows<kHeadDim>(dv, weights, channel_descriptor(shared.stage[now.stage].dout));

      wgmma_wait<1>();  // the differences
      fence_registers(difference);
      for_each_pair(terms.delta, [&](int i, float delta) { difference[i] -= delta; });
      if (Config::kRoleSums) {
        sums.add(table, first_key_of_thread(), now.q0,
                 [&](int i) { return fminf(factor[i], a.limit) * difference[i]; });
      }
#pragma unroll
      for (int i = 0; i < kPairsOfThread; ++i) difference[i] *= factor[i];
      round_pairs(products, difference);
      if (Config::kRoleSums && test) hide(products, reading, table, now.q0);
      fence_registers(products);
      add_rows<kHeadDim>(dk, products, channel_descriptor(shared.stage[now.stage].q));

      before = now.stage;
      if (!next_tile(table, now, before)) break;
      start_scores(factor, now);
    }
    __syncwarp();
    hand_back(shared.empty_keys[key_ring.stage]);
    finish(before);
  }

  __device__ void store(const Table& table, __nv_bfloat16* to, const Strides& stride,
                        const Gradient& gradient, float factor) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t position = table.position[first_key_of_thread() + 8 * i];
      const bool exists = position != kNoPosition;
      __nv_bfloat16* row = to + table.batch * stride.batch + table.kv_head * stride.head +
                           (exists ? position : 0) * stride.token;
      store_row(row, gradient, i, factor, true, exists);
    }
  }

  // Zeros for a span past the length.
  __device__ void write_zeros(const Table& table) const {
    constexpr int32_t kChunks = kHeadDim / 8, kThreads = Config::kConsumers * kWarpgroupThreads;
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - kWarpgroupThreads;
    const auto at = [&](__nv_bfloat16* to, const Strides& stride, int32_t i) {
      return reinterpret_cast<uint4*>(to + table.batch * stride.batch +
                                      table.kv_head * stride.head +
                                      (table.span.begin + i / kChunks) * stride.token) +
             i % kChunks;
    };
    for (int32_t i = thread; i < (table.span.end - table.span.begin) * kChunks; i += kThreads) {
      *at(a.dk, a.dk_stride, i) = uint4{};
      *at(a.dv, a.dv_stride, i) = uint4{};
    }
    if (Config::kRoleSums) write_no_role_sums(a, table);
  }

  __device__ void do_block(const Table& table) {
    if (table.span.past_length) return write_zeros(table);
    if (Config::kRoleSums) sums = {};
    walk.start(table.tiles, a.group);
    Gradient dk = {}, dv = {};
    if (!walk.done()) {
      // Also by a warpgroup without tiles: it must not hand the next block's keys back early.
      barrier_wait(shared.full_keys[key_ring.stage], key_ring.parity);
      gather(table, dk, dv);
      key_ring.advance();
      fence_registers(dk);
      fence_registers(dv);
    }
    store(table, a.dk, a.dk_stride, dk, a.scale);
    store(table, a.dv, a.dv_stride, dv, 1);
    if (Config::kRoleSums) sums.write(a, table, first_key_of_thread());
  }

  __device__ void run() {
    for_each_table(shared, [&](const Table& table) { do_block(table); });
  }
};

template <int kHeadDim>
int32_t keys_of_key_gradient() {
  return KeyTable<KeyGradientConfig<kHeadDim, false>::kConsumers>::kKeys;
}

template <int kHeadDim>
void launch_key_gradient(const KeyParallelArguments& arguments, int multiprocessors,
                         CUstream_st* stream) {
  if constexpr (brings_role_sums(kHeadDim)) {
    if (arguments.horizon_count > 0) {
      return launch_key_parallel<KeyGradientConfig<kHeadDim, true>, KeyGradientConsumer>(
          arguments, multiprocessors, stream);
    }
  }
  launch_key_parallel<KeyGradientConfig<kHeadDim, false>, KeyGradientConsumer>(
      arguments, multiprocessors, stream);
}

}  // namespace natslm::kernels::sm90
