// Which places of a KeyOrder a tile of queries reads. Pure index arithmetic: the device and the
// tests on the CPU run the same lines.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/sorted_keys.h"

namespace natslm::kernels::cuda {

// A search for the first place of [begin, end) whose value is at least `threshold` (end if there is
// none); the values ascend there.
struct Search {
  const int32_t* values;
  int32_t threshold, begin, end;
};

NATSLM_HD constexpr int32_t first_place(const Search& search) {
  int32_t begin = search.begin, count = search.end - search.begin;
  while (count > 0) {
    const int32_t half = count / 2;
    const bool beyond = search.values[begin + half] < search.threshold;
    begin = beyond ? begin + half + 1 : begin;
    count = beyond ? count - half - 1 : half;
  }
  return begin;
}

// The four bounds of a run, in the order of KeyRun's members.
inline constexpr int kRunBounds = 4;

// What finds a bound of the run of queries [q0, q1] in a segment of the order of one (sequence, KV
// head); position and last are those of the key at each place, ends and reach KeyOrder's.
NATSLM_HD constexpr Search run_search(int segment, int bound, const int32_t* position,
                                      const int32_t* last, const int32_t* ends, int32_t reach,
                                      int32_t q0, int32_t q1) {
  const int32_t begin = segment == 0 ? 0 : ends[segment - 1], end = ends[segment];
  const Search past_the_diagonal = {position, q1 + 1, begin, end};
  if (segment == KeyOrder::kSegments - 1) {
    // Dead for q0 if even the longest life in reach is too short. Lifetimes inside the reach
    // differ, so no key is known to be read by every query: the full part is empty.
    return bound == 0 ? Search{position, q0 - reach, begin, end} : past_the_diagonal;
  }
  // `last` never falls: alive for q0 from some place on, for q1 from a later one.
  if (bound == 0) return {last, q0, begin, end};
  if (bound == 1) return {last, q1, begin, end};
  return bound == 2 ? Search{position, q0 + 1, begin, end} : past_the_diagonal;
}

// The run from the places that were found, which may overlap: where all keys up to the diagonal
// have died, the living begin beyond it.
NATSLM_HD constexpr KeyRun ordered_run(int32_t begin, int32_t full_begin, int32_t full_end,
                                       int32_t end) {
  const auto clamp = [](int32_t x, int32_t low, int32_t high) {
    return x < low ? low : x > high ? high : x;
  };
  const int32_t first = begin < end ? begin : end;
  const int32_t full = clamp(full_begin, first, end);
  return {first, full, clamp(full_end, full, end), end};
}

// Work is handed out by the number of keys a tile reads, in buckets of `kWorkBucketKeys` keys or
// wider: bucket 0 is the most.
inline constexpr int32_t kWorkBuckets = 1024;
inline constexpr int32_t kWorkBucketKeys = 64;

NATSLM_HD constexpr int32_t work_bucket(int32_t keys, int32_t tokens) {
  const int32_t narrowest = (tokens - 1) / (kWorkBuckets - 1) + 1;
  const int32_t width = narrowest > kWorkBucketKeys ? narrowest : kWorkBucketKeys;
  const int32_t full = keys > 0 ? (keys - 1) / width + 1 : 0;
  return full < kWorkBuckets ? kWorkBuckets - 1 - full : 0;
}

// The stable counting sort by bucket takes the items in chunks of whole warps' slices; the number
// of chunks is limited because every chunk reads the counts of all.
struct WorkChunks {
  int32_t items, chunks;  // items of a chunk; their number
};
inline constexpr int32_t kWorkSlice = 256;  // items of a warp, times the chunk's multiple
inline constexpr int32_t kWorkWarps = 8;
inline constexpr int32_t kMaxWorkChunks = 64;

NATSLM_HD constexpr WorkChunks work_chunks(int64_t work_items) {
  constexpr int32_t kSmallest = kWorkSlice * kWorkWarps;
  const int64_t smallest_chunks = (work_items + kSmallest - 1) / kSmallest;
  const auto multiple =
      static_cast<int32_t>((smallest_chunks + kMaxWorkChunks - 1) / kMaxWorkChunks);
  const int32_t items = kSmallest * (multiple > 0 ? multiple : 1);
  return {items, static_cast<int32_t>((work_items + items - 1) / items)};
}

}  // namespace natslm::kernels::cuda
