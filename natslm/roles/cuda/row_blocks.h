// How a row of tokens (one sequence and KV head) is cut into blocks of threads. Pure arithmetic,
// which the tests on the CPU run as well.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"

namespace natslm::roles {

// Most role chunks of a block: two for each thread.
inline constexpr int32_t kBlockThreads = 512;
inline constexpr int32_t kMaxChunks = 2 * kBlockThreads;

// Most blocks that one launch can make wait for one another: a cluster of Hopper, of the size that
// not every device can place.
inline constexpr int32_t kMaxTogether = 16;

struct RowBlocks {
  int32_t chunks;  // of every block; the last blocks may have fewer, or none
  int32_t count;   // blocks of a row, at least 1: rows without tokens have shares, too
  bool together;   // the blocks of a row are one cluster (or one block): one launch does it all
};

// `most_together`: what the device can place as one cluster, a power of two up to kMaxTogether; 1:
// no clusters.
NATSLM_HD constexpr RowBlocks row_blocks(int32_t tokens, int32_t chunk, int32_t most_together) {
  // A block has at most some kMaxChunks tokens, or one chunk if that is longer.
  const int32_t most = chunk < kMaxChunks ? kMaxChunks / chunk : 1;
  const int32_t slots = tokens / chunk + (tokens % chunk != 0);  // the incomplete chunk included
  int32_t count = 1;
  while (count < most_together && int64_t{count} * most < slots) count *= 2;
  if (int64_t{count} * most >= slots) {
    const int32_t even = slots / count + (slots % count != 0);
    return {even > 0 ? even : 1, count, true};
  }
  return {most, slots / most + (slots % most != 0), false};
}

}  // namespace natslm::roles
