// Instructions and tile products of the portable GPU kernels: one instruction, one function, named
// for its effect. Everything that is not plain C++ stands here.
//
// A tile is [rows][kHeadDim] bf16 in shared memory at a multiple of kTileAlignment bytes. Its
// 16-byte chunks are swizzled: chunk c of row r lies where c ^ (r % 8) would, so that the eight
// rows that one 8x8 matrix of ldmatrix touches fall on different banks.
//
// Fragments are those of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"). A lane is
// g = lane / 4 and t = lane % 4; it holds of an accumulator rows g, g + 8 and columns 2t, 2t + 1 as
// {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "natslm/base/lifetime.h"

namespace natslm::kernels::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kInfinity = __builtin_huge_valf();

// ---- Instructions -------------------------------------------------------------------------------

// The dynamic shared memory of the block.
__device__ inline uint8_t* block_memory() {
  extern __shared__ __align__(1024) uint8_t natslm_block_memory[];
  return natslm_block_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory, around L1; writes zeros where not `valid`.
__device__ inline void copy_16_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0));
}

// The same for 4 bytes.
__device__ inline void copy_4_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 4 : 0));
}

// Waits for all copies that this thread has started. Others see them after a barrier.
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Named barrier `id` (1..15) of `threads` threads: some only announce that they came by, others
// wait until all of them have. What was written before is visible to those who waited.
__device__ inline void arrive_at_barrier(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void wait_at_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four 8x8 matrices; lanes 8m .. 8m + 7 name the rows of matrix m (16 bytes each).
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// c[16 x 8] += a[16 x 16] b[16 x 8].
__device__ inline void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to bf16, `low` in the lower half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x to about 2 ulp; 0 for -inf.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(scale * score - lse), the probability of a pair from the stored log-sum-exp. The difference
// is rounded once, so that it is as exact as the scores however large they are; folding the change
// of base into the scale would cost one instruction less and be wrong by 2^-24 of the *scores*.
__device__ inline float probability(float score, float scale, float lse) {
  return power_of_2(fmaf(score, scale, -lse) * kLog2E);
}

// ---- Tiles --------------------------------------------------------------------------------------

template <int kHeadDim>
inline constexpr int kRowBytes = 2 * kHeadDim;
// At least a row, so that a lane's address has zeros where the offset of a channel is.
template <int kHeadDim>
inline constexpr int kTileAlignment = kRowBytes<kHeadDim> > 256 ? kRowBytes<kHeadDim> : 256;

// Bytes from the start of a tile to chunk `chunk` (8 channels) of row `row`.
template <int kHeadDim>
NATSLM_HD constexpr uint32_t tile_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes<kHeadDim> + ((chunk ^ (row & 7)) << 4));
}

// Where a lane points ldmatrix in a tile. `by_rows`: the 16 x 16 corner as an A operand (rows are
// rows of A), and, transposed, as a B operand whose inner dimension are the tile's rows.
// `by_columns`: the corner as a B operand whose columns are the tile's rows.
// As offsets have the swizzle in bits 4..7 and no other part there, 16 channels further on is
// offset ^ 32, 32 channels offset ^ 64, and so on.
template <int kHeadDim>
NATSLM_HD constexpr uint32_t by_rows(int lane) {
  return tile_offset<kHeadDim>(lane & 15, lane >> 4);
}
template <int kHeadDim>
NATSLM_HD constexpr uint32_t by_columns(int lane) {
  return tile_offset<kHeadDim>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

template <int kM, int kN>
__device__ inline void clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) c[m][n][x] = 0;
    }
  }
}

// c += A B^T over all channels: A is 16 kM rows of a tile, B is 8 kN rows. `a` and `b` are lane
// addresses: the tile's plus by_rows and by_columns.
template <int kHeadDim, int kM, int kN>
__device__ inline void multiply_channels(float (&c)[kM][kN][4], uint32_t a, uint32_t b) {
  static_assert(kN % 2 == 0);
  constexpr int kStep = 16 * kRowBytes<kHeadDim>;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_matrices(rows[m], (a ^ (d << 5)) + m * kStep);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t columns[4];
      load_matrices(columns, (b ^ (d << 5)) + n / 2 * kStep);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_16x8x16(c[m][n], rows[m], columns[0], columns[1]);
        multiply_16x8x16(c[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// c += A B^T with A's fragments in registers.
template <int kHeadDim, int kM, int kN>
__device__ inline void multiply_channels(float (&c)[kM][kN][4],
                                         const uint32_t (&a)[kM][kHeadDim / 16][4], uint32_t b) {
  static_assert(kN % 2 == 0);
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t columns[4];
      load_matrices(columns, (b ^ (d << 5)) + n / 2 * 16 * kRowBytes<kHeadDim>);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_16x8x16(c[m][n], a[m][d], columns[0], columns[1]);
        multiply_16x8x16(c[m][n + 1], a[m][d], columns[2], columns[3]);
      }
    }
  }
}

// c += A B: A is an accumulator's worth of weights [16 kM x 8 kN], rounded to bf16, B is 8 kD
// channels of 8 kN rows of a tile. `b`: the tile's address plus by_rows, ^ 2 * the first channel (a
// multiple of 64).
template <int kHeadDim, int kM, int kD, int kN>
__device__ inline void multiply_weights(float (&c)[kM][kD][4], const float (&weights)[kM][kN][4],
                                        uint32_t b) {
  static_assert(kN % 2 == 0);
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      // Two accumulators side by side are an A operand.
      rows[m][0] = pack_bf16(weights[m][n][0], weights[m][n][1]);
      rows[m][1] = pack_bf16(weights[m][n][2], weights[m][n][3]);
      rows[m][2] = pack_bf16(weights[m][n + 1][0], weights[m][n + 1][1]);
      rows[m][3] = pack_bf16(weights[m][n + 1][2], weights[m][n + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      uint32_t columns[4];
      load_matrices_transposed(columns, (b ^ (d << 4)) + n / 2 * 16 * kRowBytes<kHeadDim>);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_16x8x16(c[m][d], rows[m], columns[0], columns[1]);
        multiply_16x8x16(c[m][d + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// Rounds 16 kM rows of accumulators to bf16 into a tile, row `row` of it and chunk `chunk` first.
template <int kHeadDim, int kM, int kD>
__device__ inline void store_tile(uint8_t* tile, int row, int lane, const float (&c)[kM][kD][4],
                                  int chunk = 0) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        *reinterpret_cast<uint32_t*>(tile + tile_offset<kHeadDim>(r, chunk + n) + lane % 4 * 4) =
            pack_bf16(c[m][n][2 * half], c[m][n][2 * half + 1]);
      }
    }
  }
}

// Which 16-byte chunk of which row a thread copies in pass `pass` when kThreads threads copy a tile
// together.
template <int kHeadDim, int kThreads>
struct TileCopy {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowsOfWarp = kWarpSize / kChunks;  // in one pass
  static constexpr int kRowsOfPass = kThreads / kChunks;
  // Whether the passes of a thread are a multiple of 8 rows apart and so share a swizzle.
  static constexpr bool kOneSwizzle = kRowsOfPass % 8 == 0;

  NATSLM_HD static constexpr int chunk(int thread) { return thread % kChunks; }
  NATSLM_HD static constexpr int row(int thread, int pass) {
    return thread / kChunks + pass * kRowsOfPass;
  }
};

// Starts the copy of a tile of kRows rows; from(row) is the address of a row's first channel, or
// null for a row of zeros. `somewhere` is any valid address.
template <int kHeadDim, int kRows, int kThreads, class Source>
__device__ inline void copy_tile_async(uint32_t tile, int thread, const void* somewhere,
                                       const Source& from) {
  using Copy = TileCopy<kHeadDim, kThreads>;
  static_assert(kRows % Copy::kRowsOfPass == 0);
  const int chunk = Copy::chunk(thread);
#pragma unroll
  for (int pass = 0; pass < kRows / Copy::kRowsOfPass; ++pass) {
    const int row = Copy::row(thread, pass);
    const void* source = from(row);
    copy_16_async(tile + tile_offset<kHeadDim>(row, chunk),
                  source ? static_cast<const uint8_t*>(source) + chunk * 16 : somewhere,
                  source != nullptr);
  }
}

// The same for rows that lie `step` bytes apart from `base` on: place(row, pass) counts steps, and
// negative is a row of zeros. (32-bit steps: one multiply-add an address.)
template <int kHeadDim, int kRows, int kThreads, class Place>
__device__ inline void copy_rows_async(uint32_t tile, int thread, const void* base, int32_t step,
                                       const Place& place) {
  using Copy = TileCopy<kHeadDim, kThreads>;
  static_assert(kRows % Copy::kRowsOfPass == 0);
  const int chunk = Copy::chunk(thread);
  const auto* from = static_cast<const uint8_t*>(base) + chunk * 16;
  const uint32_t first = tile + tile_offset<kHeadDim>(Copy::row(thread, 0), chunk);
#pragma unroll
  for (int pass = 0; pass < kRows / Copy::kRowsOfPass; ++pass) {
    const int row = Copy::row(thread, pass);
    const int32_t at = place(row, pass);
    const uint32_t to = Copy::kOneSwizzle ? first + pass * Copy::kRowsOfPass * kRowBytes<kHeadDim>
                                          : tile + tile_offset<kHeadDim>(row, chunk);
    copy_16_async(to, from + int64_t{max(at, 0)} * step, at >= 0);
  }
}

}  // namespace natslm::kernels::cuda
