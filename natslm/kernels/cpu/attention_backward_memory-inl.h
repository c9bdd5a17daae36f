// The sizes of attention backward for CPUs and the memory it works in, compiled once per
// instruction set. Internal to attention_backward.cc.
// SPDX-License-Identifier: Apache-2.0
#if defined(NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_MEMORY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_MEMORY_INL_H_
#undef NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_MEMORY_INL_H_
#else
#define NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_MEMORY_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/cpu/scratch_memory.h"
#include "natslm/kernels/cpu/tile_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

// The kernel's sizes. Measured on Zen 3 (AVX2) with 64 channels and 2,048 tokens.
struct Config {
  // Rows of a tile, at least (tile_of): packing a key must be cheap beside using it. With 192 the
  // sums over a tile's rows lose the accuracy that is asked of dv.
  static constexpr int kTileRows = 128;
  // Keys walked over together: with their values and the rows of a block they fit into the first
  // cache level. 64 of them do so in the 48 KiB of a Sapphire Rapids core (1 % faster there), not
  // in the 32 KiB of a Zen 3 core (1 % slower).
  static constexpr int kBatch = kLanes == 16 ? 64 : 32;
  // Live keys that are worked off together, and room for what the last batch adds to them.
  static constexpr int kFullSlots = 64, kSlots = kFullSlots + kBatch;
  // Tasks that the heads are cut into, more or less: enough for a few workers, but each has sums of
  // its own that must be cleared and added up (2 % of the time at 12, 3 % at 18).
  static constexpr int kTasks = 16;
  static constexpr int64_t kMostSumBytes = int64_t{512} << 20;
};
static_assert(Config::kBatch % kGroup == 0 && Config::kSlots % kScalars == 0);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Channels of row-major arrays are cut into pieces of kBlockRows, the last one filled up with 0;
// only whole vectors of them are computed with.
struct Plan {
  explicit Plan(const AttentionBackward& p)
      : group(p.q_heads / p.kv_heads),
        tile(tile_of(group, Config::kTileRows)),
        blocks(tile * group / kBlockRows),
        rows(tile * group),
        head_dim(p.head_dim),
        pieces((p.head_dim + kBlockRows - 1) / kBlockRows) {}
  int padded_width() const { return pieces * kBlockRows; }
  int width() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  int piece_width(int piece) const { return std::min(kBlockRows, head_dim - piece * kBlockRows); }
  int group, tile, blocks, rows, head_dim, pieces;
};

// What one part adds up over its tiles. Most keys die early and get something from few tiles: the
// rows of dk and dv count, and are cleared, only from the first time that a tile needs them.
struct Sums {
  Sums(const Plan& plan, int horizons, int tokens)
      : width(plan.width()),
        dk(scratch_memory(int64_t{tokens} * width)),
        dv(scratch_memory(int64_t{tokens} * width)),
        in_use(tokens),
        roles(int64_t{horizons} * tokens) {}
  void clear() {
    std::fill(in_use.begin(), in_use.end(), 0);
    std::fill(roles.begin(), roles.end(), 0.0f);
  }
  void use(int32_t key) {
    if (in_use[key]) return;
    in_use[key] = 1;
    fill(dk.get() + int64_t{key} * width, width, 0);
    fill(dv.get() + int64_t{key} * width, width, 0);
  }
  int width;
  ScratchMemory dk, dv;         // [T, width]
  std::vector<uint8_t> in_use;  // [T]
  std::vector<float> roles;     // [horizons, T]
};

// Live keys whose products are still to be formed. Those that every query of the tile sees and the
// others are kept apart, so that the few rows that see one of the others are a range of blocks.
struct Slots {
  float* k;       // [kSlots][kRowStride]
  float *p, *ds;  // [blocks][kSlots][kBlockRows]; 0 outside a slot's range
  int count = 0;
  int32_t key[Config::kSlots];
  int first_block[Config::kSlots], end_block[Config::kSlots];  // a slot's range of row blocks

  float* at(float* array, int block, int i) const {
    return array + (int64_t{block} * Config::kSlots + i) * kBlockRows;
  }
};

// What a worker needs for one tile; kept from tile to tile.
struct Scratch {
  Scratch(const Plan& plan, int tokens) : position(plan.rows), keys(tokens + 1) {
    const int64_t d = plan.head_dim, rows = plan.rows, width = plan.padded_width();
    const auto make = [&](float*& part, int64_t size) {
      memory.push_back(scratch_memory(size));
      part = memory.back().get();
      fill(part, size, 0);
    };
    make(q, rows * width);
    make(dout, rows * width);
    make(q_columns, rows * d);
    make(dout_columns, rows * d);
    make(dq_columns, rows * d);
    make(k, Config::kBatch * kRowStride);
    make(v, Config::kBatch * kRowStride);
    make(score, Config::kBatch * kBlockRows);
    make(dscore, Config::kBatch * kBlockRows);
    for (Slots* slots : {&whole, &partial}) {
      make(slots->k, Config::kSlots * kRowStride);
      make(slots->p, Config::kSlots * rows);
      make(slots->ds, Config::kSlots * rows);
    }
    make(lse, rows);
    make(role_lse, rows);
    make(delta, rows);
    make(row_major, kBlockRows * width);
    make(out_columns, kBlockRows * d);
    make(g_sum, Config::kBatch * kLanes);
    make(g_partial, kMaxHorizons * Config::kBatch * kLanes);
  }
  std::vector<ScratchMemory> memory;
  float *q, *dout;                               // [pieces][rows][kBlockRows]
  float *q_columns, *dout_columns, *dq_columns;  // [blocks][D][kBlockRows]
  float *k, *v;                                  // [kBatch][kRowStride]
  float *score, *dscore;                         // [kBatch][kBlockRows]: q . k, dout . v
  float *lse, *role_lse, *delta;                 // [rows]; lse = +inf makes a row add nothing
  float* row_major;                              // [kBlockRows][D]
  float* out_columns;                            // [D][kBlockRows]
  float* g_sum;      // [kBatch][kLanes]: sum of g over the tile's rows, lane by lane
  float* g_partial;  // [horizons][kBatch][kLanes]: of the rows up to a horizon inside the tile
  Slots whole, partial;
  std::vector<int32_t> position;  // [rows]; past the tile: -1, which sees no key
  std::vector<int32_t> keys;      // to walk over, ascending
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_MEMORY_INL_H_
