// What the CPU decode kernel does apart from arithmetic on vectors: how the work is cut, how the
// parts of a long list of keys are put together, and the exact path for rows with infinities or
// NaN.
//
// A cut depends on the sequence alone, never on its neighbours or on the number of workers, so a
// sequence's result does not either.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "natslm/kernels/attention_decode.h"

namespace natslm::kernels::cpu {

// The rows of a task are "packed": the group's query heads of a position lie together, so packed
// row m of a sequence is query row_start + m / group, head m % group of the KV head.
struct DecodeTask {
  int32_t list = 0;              // sequence * Hkv + KV head
  int32_t row = 0, rows = 0;     // packed rows of that sequence
  int32_t key = 0, key_end = 0;  // stored keys; key is a multiple of kPageKeys
  int64_t partial = -1;          // where in the scratch its result goes; -1: straight to the output
};

inline constexpr int32_t kDecodeBlockRows = 48;    // packed rows of a task: their scores stay in L1
inline constexpr int32_t kDecodePieceKeys = 1024;  // keys of a task when one block holds all rows

struct DecodePlan {
  std::vector<DecodeTask> tasks;
  // Lists whose keys were cut: [begin, end) of their tasks, in the order of the keys.
  struct Cut {
    int64_t begin = 0, end = 0;
  };
  std::vector<Cut> cuts;
  int64_t partial_floats = 0;  // rows * (head_dim + 2) of every cut task
};
DecodePlan plan_decode(const AttentionDecode& p);

// Tasks of the second pass that sums what each key received; every key is in exactly one.
std::vector<DecodeTask> plan_mass(const AttentionDecode& p);

// Index of a packed row in [rows, Hq].
inline int64_t row_of(const AttentionDecode& p, int32_t list, int32_t packed) {
  const int32_t group = p.q_heads / p.kv_heads;
  const int64_t row = p.row_start[list / p.kv_heads] + packed / group;
  return row * p.q_heads + list % p.kv_heads * group + packed % group;
}
inline int32_t position_of(const AttentionDecode& p, int32_t list, int32_t packed) {
  return p.row_position[p.row_start[list / p.kv_heads] + packed / (p.q_heads / p.kv_heads)];
}

// One row in double precision over the visible keys alone; returns its lse. `at` as from row_of.
float attend_row_exactly(const AttentionDecode& p, int32_t list, int64_t at, int32_t position);

}  // namespace natslm::kernels::cpu
