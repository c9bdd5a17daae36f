// Role sums over all causal pairs on Hopper: two products a pair, nothing else.
//
// Keys and values of a warpgroup stay in its registers as left operands, so that shared memory
// carries the queries alone; three warpgroups share each tile of queries, and while one computes
// exponentials the tensor cores work for the other two.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/attention_backward_stream.cuh"

namespace natslm::kernels::sm90 {

template <int kHeadDim_>
struct RoleSumsConfig {
  using Arguments = KeyParallelArguments;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kKeysByStage = true;
  // In a thread: kHeadDim / 2 for keys and values, 2 x 32 for scores and differences.
  static constexpr int kConsumers = 3;
  static constexpr int kStages = kHeadDim == 64 ? 8 : 6;
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                register_pool(kConsumers + 1));

  struct alignas(kSwizzleBytes) Shared {
    QueryStage<kHeadDim> stage[kStages];
    alignas(128) TileTerms terms[kStages];
    KeyTable<kConsumers> table[kTables];
    uint64_t full[kStages], empty[kStages];
    uint64_t full_table[kTables], empty_table[kTables];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block can have on compute capability 9.0");
};

template <class Config>
struct RoleSumsConsumer {
  using Shared = typename Config::Shared;
  static constexpr int kHeadDim = Config::kHeadDim, kSteps = kHeadDim / 16;
  using Operand = RowOperand<kHeadDim>;
  using Table = KeyTable<Config::kConsumers>;

  const KeyParallelArguments& a;
  Shared& shared;
  const int32_t warpgroup;
  QueryWalk<Config::kStages> walk;

  __device__ RoleSumsConsumer(const KeyParallelArguments& arguments, Shared& s, int32_t group)
      : a(arguments), shared(s), warpgroup(group) {}

  // The warp's 16 rows of a swizzled [64][D].
  template <int kHalves>
  __device__ static void load_rows(
      Operand& to, const __nv_bfloat16 (&from)[kHalves][kTileQueries][kSwizzleColumns]) {
    const int32_t lane = threadIdx.x % kWarpThreads;
    const int32_t row = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int32_t chunk = (step % 4 * 2 + lane / 16) ^ (row % 8);
      load_matrices(to[step], shared_address(&from[step / 4][row][chunk * 8]));
    }
  }

  __device__ void load_keys(Operand& k, Operand& v) {
#pragma unroll 1
    for (int w = 0; w < Config::kConsumers; ++w) {
      const int32_t stage = walk.ring.stage;
      barrier_wait(shared.full[stage], walk.ring.parity);
      if (w == warpgroup) {
        load_rows(k, shared.stage[stage].q);
        load_rows(v, shared.stage[stage].dout);
      }
      __syncwarp();
      hand_back(shared.empty[stage]);
      walk.ring.advance();
    }
  }

  __device__ void add_tile(RoleSums& sums, const Table& table, const Operand& k, const Operand& v,
                           int32_t stage, int32_t q0) {
    PairRegisters factor, difference;
    start_pairs<kHeadDim>(factor, k, matrix_descriptor(shared.stage[stage].q[0]));
    start_pairs<kHeadDim>(difference, v, matrix_descriptor(shared.stage[stage].dout[0]));
    wgmma_wait<1>();
    fence_registers(factor);
    const TileTerms& terms = shared.terms[stage];
    for_each_pair(terms.lse, [&](int i, float lse) {
      factor[i] = fminf(exp2_fast(fmaf(factor[i], a.scale_log2, -lse)), a.limit);
    });
    wgmma_wait<0>();
    fence_registers(difference);
    for_each_pair(terms.delta, [&](int i, float delta) { difference[i] -= delta; });
    sums.add(table, first_key_of_thread(), q0, [&](int i) { return factor[i] * difference[i]; });
  }

  __device__ void do_block(const Table& table) {
    if (table.span.past_length) return write_no_role_sums(a, table);
    RoleSums sums;
    walk.start(table.tiles, a.group);
    if (!walk.done()) {
      Operand k, v;
      load_keys(k, v);
      for (; !walk.done(); walk.advance()) {
        const int32_t stage = walk.ring.stage, q0 = walk.first_query();
        barrier_wait(shared.full[stage], walk.ring.parity);
        if (adds_to_role_sums(table.bounds[warpgroup], q0)) add_tile(sums, table, k, v, stage, q0);
        __syncwarp();
        hand_back(shared.empty[stage]);
      }
    }
    sums.write(a, table, first_key_of_thread());
  }

  __device__ void run() {
    for_each_table(shared, [&](const Table& table) { do_block(table); });
  }
};

template <int kHeadDim>
int32_t keys_of_role_sums() {
  return KeyTable<RoleSumsConfig<kHeadDim>::kConsumers>::kKeys;
}

template <int kHeadDim>
void launch_role_sums(const KeyParallelArguments& arguments, int multiprocessors,
                      CUstream_st* stream) {
  launch_key_parallel<RoleSumsConfig<kHeadDim>, RoleSumsConsumer>(arguments, multiprocessors,
                                                                  stream);
}

}  // namespace natslm::kernels::sm90
