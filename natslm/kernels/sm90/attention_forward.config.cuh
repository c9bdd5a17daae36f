// Numbers of the Hopper forward kernel for one head size.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "natslm/kernels/sm90/attention_forward.h"
#include "natslm/kernels/sm90/hopper.cuh"
#include "natslm/kernels/sm90/key_tiles.h"

namespace natslm::kernels::sm90 {

// What the consumers need to know of the query tile they are about to work on.
struct QueryTile {
  int32_t batch;  // -1: there is no more work
  int32_t kv_head;
  int32_t first_query;  // position of row 0
  int32_t length;       // of the sequence
  bool sees_keys;       // false: nothing is loaded, the output is zero
};

// kQueryStages: query tiles whose Q is there or on its way.
template <int kHeadDim_, int kConsumers_, int kQueryStages_>
struct ForwardConfig {
  using Arguments = ForwardArguments;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128);

  // Consumer warpgroups of 64 rows each (a row: one query of one head). Accumulators: kHeadDim / 2
  // for the output, 64 for the scores, 32 for the probabilities in a thread. Head size 64 leaves
  // room for a third warpgroup, whose exponentials fill the tensor cores' shorter turns.
  static constexpr int kConsumers = kConsumers_, kQueryStages = kQueryStages_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;  // of K and of V
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);

  // Together at most what the block is launched with: 65,536 / kThreads a thread, rounded down
  // to 8.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                register_pool(kConsumers + 1));

  static constexpr int kHalves = kHeadDim / kSwizzleColumns;
  static constexpr bool kLoadsDout = false;
  using Element = __nv_bfloat16;

  struct alignas(kSwizzleBytes) Shared {
    Element q[kQueryStages][kHalves][kRows][kSwizzleColumns];
    Element k[kStages][kHalves][kTileKeys][kSwizzleColumns];
    Element v[kStages][kHalves][kTileKeys][kSwizzleColumns];
    // With the keys of a stage; belongs to whoever owns its part of k.
    alignas(16) int32_t position[kStages][kTileKeys];
    alignas(16) int32_t last[kStages][kTileKeys];  // -1: no key there
    uint32_t flags[kStages];                       // see kPiecesToTest
    QueryTile query_tile[kQueryStages];            // belongs to whoever owns its part of q
    uint64_t full_q[kQueryStages], empty_q[kQueryStages];
    uint64_t full_k[kStages], empty_k[kStages];
    uint64_t full_v[kStages], empty_v[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block can have on compute capability 9.0");
};

// What the consumers must know of a key tile, in one word: bit 4p is set where a key of piece p may
// be hidden from a query; bits 1..3 are the number of pieces that hold keys, less one.
inline constexpr uint32_t kPiecesToTest = 0x11111111u;
inline constexpr uint32_t kLastKeyTile = 0x80000000u;
NATSLM_HD constexpr bool piece_needs_test(uint32_t flags, int piece) {
  return (flags >> (4 * piece) & 1) != 0;
}
NATSLM_HD constexpr uint32_t piece_count(int pieces) {
  return static_cast<uint32_t>(pieces - 1) << 1;
}
NATSLM_HD constexpr int pieces_with_keys(uint32_t flags) {
  return static_cast<int>(flags >> 1 & 7) + 1;
}
// From one bit for each four keys in a row: set where all queries see all four.
NATSLM_HD constexpr uint32_t pieces_to_test(uint32_t fours_seen) {
  const uint32_t eights = fours_seen & fours_seen >> 1;
  return ~(eights & eights >> 2) & kPiecesToTest;
}

}  // namespace natslm::kernels::sm90
