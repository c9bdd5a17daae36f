// Which places of a KeyOrder a tile of queries reads. Pure index arithmetic: the device and the
// tests on the CPU run the same lines.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/sorted_keys.h"

namespace natslm::kernels::cuda {

// For each n: moves place[n] to the first place of [place[n], end[n]) whose value is at least
// threshold[n], or to end[n]; values[n] must ascend there. All searches advance together, so that
// on the device their loads are in flight at the same time.
template <int kCount>
NATSLM_HD constexpr void lower_bounds(const int32_t* const (&values)[kCount],
                                      const int32_t (&threshold)[kCount],
                                      const int32_t (&end)[kCount], int32_t (&place)[kCount]) {
  uint32_t longest = 0;
  for (int n = 0; n < kCount; ++n) {
    const auto size = static_cast<uint32_t>(end[n] - place[n]);
    longest = size > longest ? size : longest;
  }
  uint32_t step = 1;
  while (step <= longest / 2) step *= 2;
  for (; step > 0 && longest > 0; step /= 2) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int n = 0; n < kCount; ++n) {
      const uint32_t probe = static_cast<uint32_t>(place[n]) + step;
      if (probe <= static_cast<uint32_t>(end[n]) && values[n][probe - 1] < threshold[n]) {
        place[n] = static_cast<int32_t>(probe);
      }
    }
  }
}

// The run of a segment from the places where its bounds were found, which may overlap: keys that
// have died before the tile can reach beyond the diagonal.
NATSLM_HD constexpr KeyRun ordered_run(int32_t begin, int32_t full_begin, int32_t full_end,
                                       int32_t end) {
  const auto clamp = [](int32_t x, int32_t low, int32_t high) {
    return x < low ? low : x > high ? high : x;
  };
  const int32_t first = begin < end ? begin : end;
  const int32_t full = clamp(full_begin, first, end);
  return {first, full, clamp(full_end, full, end), end};
}

// The runs of queries [q0, q1] in the order of one (sequence, KV head): position and last of the
// key at each place, and what KeyOrder says of the segments.
NATSLM_HD constexpr void find_runs(const int32_t* position, const int32_t* last,
                                   const int32_t* ends, int32_t reach, int32_t q0, int32_t q1,
                                   KeyRun (&runs)[KeyOrder::kSegments]) {
  // In a segment whose `last` never falls, keys are alive for q0 from some place on and alive for
  // q1 from a later one; they are past the diagonal of q0 from some place on, and of q1 from a
  // later one. In the segment of reach a key is dead for q0 if even its longest life was too short.
  const int32_t e0 = ends[0], e1 = ends[1], e2 = ends[2];
  const int32_t* const values[] = {last, last,     position, position, last,
                                   last, position, position, position, position};
  const int32_t threshold[] = {q0, q1, q0 + 1, q1 + 1, q0, q1, q0 + 1, q1 + 1, q0 - reach, q1 + 1};
  const int32_t end[] = {e0, e0, e0, e0, e1, e1, e1, e1, e2, e2};
  int32_t place[] = {0, 0, 0, 0, e0, e0, e0, e0, e1, e1};
  lower_bounds(values, threshold, end, place);
  runs[0] = ordered_run(place[0], place[1], place[2], place[3]);
  runs[1] = ordered_run(place[4], place[5], place[6], place[7]);
  // Lifetimes inside the reach differ: no key is known to be read by every query.
  runs[2] = ordered_run(place[8], place[9], place[9], place[9]);
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
