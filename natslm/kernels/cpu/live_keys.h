// Which keys a tile of queries reads, found without looking at every pair: the part of the CPU
// kernels that knows about lifetimes and not about vectors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace natslm::kernels::cpu {

// The keys of one (sequence, KV head), with the largest `last` of every stretch of kStretch keys,
// so that stretches in which everything is dead cost nothing.
class LiveKeys {
 public:
  static constexpr int32_t kStretch = 128;

  LiveKeys(const int32_t* last, int32_t length);

  // For every tile of `tile` queries, how many keys at least one of them reads.
  std::vector<int64_t> count(int32_t tile, int32_t length) const;

  // Writes the keys that at least one query of [q0, q1] reads to `keys` (room for q1 + 1) and
  // returns how many: first the `*full` ones that every query reads, then the others. Both ascend.
  int32_t find(int32_t q0, int32_t q1, int32_t* keys, int32_t* full) const;

 private:
  const int32_t* last_;
  std::vector<int32_t> longest_;  // [ceil(length / kStretch)]
};

}  // namespace natslm::kernels::cpu
