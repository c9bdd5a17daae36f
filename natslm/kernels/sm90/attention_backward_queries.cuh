// Gradient of the queries on Hopper: the forward pass's way through the keys (and its producer),
// with probabilities known from the stored log-sum-exp, and dP = dout V^T beside the scores.
//
// The scores of the next key tile are issued behind dq += dS K of this one, so that the tensor
// cores have work while exponentials are computed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/attention_backward.h"
#include "natslm/kernels/sm90/attention_forward.cuh"

namespace natslm::kernels::sm90 {

template <int kHeadDim_>
struct QueryGradientConfig {
  using Arguments = QueryGradientArguments;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kLoadsDout = true;
  // In a thread: kHeadDim / 2 for the gradient, 2 x 64 for scores and differences, 32 for dS.
  static constexpr int kConsumers = 2, kQueryStages = 1;
  static constexpr int kRows = 64 * kConsumers;
  static_assert(kRows == kQueryGradientRows);
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;  // of K and of V
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
  // The producer works with pieces of keys, as in the forward pass.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                register_pool(kConsumers + 1));

  static constexpr int kHalves = kHeadDim / kSwizzleColumns;
  using Element = __nv_bfloat16;

  struct alignas(kSwizzleBytes) Shared {
    Element q[kQueryStages][kHalves][kRows][kSwizzleColumns];
    Element dout[kQueryStages][kHalves][kRows][kSwizzleColumns];
    Element k[kStages][kHalves][kTileKeys][kSwizzleColumns];
    Element v[kStages][kHalves][kTileKeys][kSwizzleColumns];
    // With the keys of a stage; belongs to whoever owns its part of k.
    alignas(16) int32_t position[kStages][kTileKeys];
    alignas(16) int32_t last[kStages][kTileKeys];  // -1: no key there
    uint32_t flags[kStages];                       // KeyFlags
    QueryTile query_tile[kQueryStages];            // belongs to whoever owns q and dout
    uint64_t full_q[kQueryStages], empty_q[kQueryStages];
    uint64_t full_k[kStages], empty_k[kStages];
    uint64_t full_v[kStages], empty_v[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block can have on compute capability 9.0");
};

template <class Config>
struct QueryGradientConsumer {
  using Shared = typename Config::Shared;
  static constexpr int kPairs = kTileKeys / 2;  // of a thread with a key tile
  using Gradient = float[Config::kHeadDim / 2];

  const QueryGradientArguments& a;
  Shared& shared;
  const int32_t warpgroup;
  RingPosition<Config::kStages> k_ring, v_ring;
  uint32_t q_parity = 0;
  int32_t offset[2], head[2];  // of the two rows: position - first, head in the group

  __device__ QueryGradientConsumer(const QueryGradientArguments& arguments, Shared& s,
                                   int32_t group)
      : a(arguments), shared(s), warpgroup(group) {
    const int32_t thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = 64 * warpgroup + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
      offset[i] = row / a.group;
      head[i] = row - offset[i] * a.group;
    }
  }

  // Each warp hands back for itself.
  __device__ void hand_back(uint64_t& empty) {
    if (threadIdx.x % kWarpThreads == 0) barrier_arrive(empty);
  }

  __device__ bool exists(const QueryTile& tile, int i) const {
    return offset[i] < a.tile_queries && tile.first_query + offset[i] < a.tokens;
  }

  __device__ void start_factors(float (&factor)[kPairs]) {
    barrier_wait(shared.full_k[k_ring.stage], k_ring.parity);
    start_scores<Config>(factor, matrix_descriptor(shared.q[0][0][64 * warpgroup]),
                         matrix_descriptor(shared.k[k_ring.stage][0]));
  }
  __device__ void start_differences(float (&difference)[kPairs]) {
    barrier_wait(shared.full_v[v_ring.stage], v_ring.parity);
    start_scores<Config>(difference, matrix_descriptor(shared.dout[0][0][64 * warpgroup]),
                         matrix_descriptor(shared.v[v_ring.stage][0]));
  }

  __device__ void gather(const QueryTile& tile, Gradient& dq) {
    float lse[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};
    int32_t queries[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      queries[i] = tile.first_query + offset[i];
      if (exists(tile, i)) {
        const int64_t row = (int64_t{tile.batch} * a.kv_heads + tile.kv_head) * a.group + head[i];
        const int64_t stride = row_terms_stride(a.tokens);
        lse[i] = a.terms[row * stride + queries[i]];
        delta[i] = a.terms[row * stride + stride / 2 + queries[i]];
      }
    }
    float factor[kPairs], difference[kPairs];
    uint32_t products[kTileKeys / 4];
    fence_registers(dq);
    start_factors(factor);
    int32_t before = -1;  // stage of the K before, whose product may not be finished
    for (;;) {
      const int32_t stage = k_ring.stage;
      wgmma_wait<1>();  // all but the scores: the products before are free
      if (before >= 0) hand_back(shared.empty_k[before]);
      start_differences(difference);
      wgmma_wait<1>();  // the scores
      fence_registers(factor);
      const uint32_t flags = shared.flags[stage];
      hide(factor, flags, shared.position[stage], shared.last[stage], queries);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        factor[i] = exp2_fast(fmaf(factor[i], a.scale_log2, -lse[i / 2 % 2]));
      }
      wgmma_wait<0>();
      fence_registers(difference);
      __syncwarp();
      hand_back(shared.empty_v[v_ring.stage]);
      v_ring.advance();
      if (flags & kLastKeyTile) hand_back(shared.empty_q[0]);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        factor[i] *= difference[i] - delta[i / 2 % 2];
      }
      round_pairs(products, factor);
      start_output<Config>(dq, products,
                           matrix_descriptor(shared.k[stage][0], sizeof(shared.k[0][0])));
      before = stage;
      k_ring.advance();
      if (flags & kLastKeyTile) break;
      start_factors(factor);
    }
    wgmma_wait<0>();
    fence_registers(dq);
    hand_back(shared.empty_k[before]);
  }

  __device__ void store(const QueryTile& tile, const Gradient& dq) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t position = tile.first_query + offset[i];
      const bool counts = position < tile.length;
      __nv_bfloat16* row = a.out + tile.batch * a.out_stride.batch +
                           (tile.kv_head * a.group + head[i]) * a.out_stride.head +
                           position * a.out_stride.token;
      store_row(row, dq, i, a.scale, counts, exists(tile, i));
    }
  }

  __device__ void run() {
    for (;; q_parity ^= 1) {
      barrier_wait(shared.full_q[0], q_parity);
      const QueryTile tile = shared.query_tile[0];
      if (tile.batch < 0) return;
      Gradient dq = {};
      if (tile.sees_keys) {
        gather(tile, dq);
      } else {
        __syncwarp();
        hand_back(shared.empty_q[0]);
      }
      store(tile, dq);
    }
  }
};

template <int kHeadDim>
struct QueryGradientKernel {
  using Config = QueryGradientConfig<kHeadDim>;
  using Producer = sm90::Producer<Config>;
  using Consumer = QueryGradientConsumer<Config>;
  __device__ static void init_barriers(typename Config::Shared& shared) {
    init_tile_barriers<Config>(shared);
  }
};

template <int kHeadDim>
void launch_query_gradient(const QueryGradientArguments& arguments, int multiprocessors,
                           CUstream_st* stream) {
  launch_warp_roles<QueryGradientKernel<kHeadDim>>(arguments, arguments.work_items, multiprocessors,
                                                   stream);
}

}  // namespace natslm::kernels::sm90
