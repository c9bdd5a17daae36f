// Hopper's instructions, each one a function named for its effect: barriers in shared memory, the
// bulk tensor copy engine (TMA), warpgroup matrix multiply (wgmma), registers per warpgroup.
//
// Matrices in shared memory are made of tiles [rows][64] of bfloat16 whose rows of 128 bytes are
// swizzled: the 16-byte chunk c of row r lies at chunk c ^ (r % 8). A tile starts at a multiple of
// 1,024 bytes (8 rows, one period of the swizzle). TMA writes them so, wgmma reads them so.
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".)
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>

namespace natslm::kernels::sm90 {

inline constexpr int kWarpThreads = 32;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kSwizzleColumns = 64;  // of bfloat16: 128 bytes
inline constexpr int kSwizzleBytes = 1024;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- Barriers in shared memory. A phase ends when all its arrivals have come and all bytes it
// expects have been written; then the parity that waits name flips. ----

__device__ inline void barrier_init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// After barrier_init and before a block-wide barrier: TMA, too, sees the barriers initialised.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// The current phase also waits for this many bytes. Not an arrival.
__device__ inline void barrier_expect_bytes(uint64_t& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Returns once the phase of this parity has ended; at once where the barrier is in the next one.
// (So parity 1 passes on a fresh barrier.)
__device__ inline void barrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// ---- Hardware barriers 1..15 among some warps of the block (0 is __syncthreads). ----

// Waits until `threads` threads in all have come, by either function.
__device__ inline void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Copies of single rows, by each thread for itself. ----

// Starts a copy of 16 bytes to shared memory, around L1.
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The same; writes zeros where not `exists`.
__device__ inline void copy_async(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Closes the group of the copies that this thread has started since the last one.
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the kPending youngest of this thread's groups are unfinished.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What this thread has read from or written to shared memory, or has seen arrive there, comes
// before what wgmma and TMA do there after the next barrier.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA. One thread issues a copy; the barrier counts its bytes, those of coordinates outside
// the tensor too (these read as zero). Coordinates: innermost dimension first. ----

__device__ inline void tma_load(void* to, const CUtensorMap& map, uint64_t& barrier, int32_t c0,
                                int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ inline void tma_load(void* to, const CUtensorMap& map, uint64_t& barrier, int32_t c0,
                                int32_t c1, int32_t c2, int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__device__ inline void tma_load(void* to, const CUtensorMap& map, uint64_t& barrier, int32_t c0,
                                int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// ---- wgmma: a warpgroup multiplies [64][16] by [16][N] into float registers. Thread t of the
// warpgroup holds, for each block j of 8 columns, d[4j + {0, 1}] in row 16 (t / 32) + t % 32 / 4
// and columns 8j + 2 (t % 4) + {0, 1}, and d[4j + {2, 3}] in the same columns 8 rows further down.
// ----

// Describes an operand in swizzled tiles. Rows are 128 bytes apart; along the contiguous dimension
// the next tile of 64 columns is `next_tile` bytes away (used only where N is contiguous).
__device__ inline uint64_t matrix_descriptor(const void* tile, uint32_t next_tile = 16) {
  constexpr uint64_t kEightRows = uint64_t{kSwizzleBytes >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightRows | uint64_t{next_tile >> 4} << 16 |
         (shared_address(tile) & 0x3ffff) >> 4;
}

// The descriptor of the operand that starts `bytes` further on.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Registers written so far are seen by the multiplications issued after this.
__device__ inline void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of the multiplications issued since the last commit.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler moves no use of these registers across this point: without it, it may touch a result
// before the wait, since it does not know that multiplications are asynchronous.
template <int kCount>
__device__ inline void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ inline void fence_registers(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

#define NATSLM_WGMMA_8(d, i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

// d (+)= A * B: A [64][16] and B [16][128], both in shared memory with K contiguous.
__device__ inline void wgmma_m64n128k16(float* d, uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n}\n"
      : NATSLM_WGMMA_8(d, 0), NATSLM_WGMMA_8(d, 8), NATSLM_WGMMA_8(d, 16), NATSLM_WGMMA_8(d, 24),
        NATSLM_WGMMA_8(d, 32), NATSLM_WGMMA_8(d, 40), NATSLM_WGMMA_8(d, 48), NATSLM_WGMMA_8(d, 56)
      : "l"(a), "l"(b), "r"(int32_t{accumulate}));
}

// d (+)= A * B: A [64][16] and B [16][64], both in shared memory with K contiguous.
__device__ inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}\n"
      : NATSLM_WGMMA_8(d, 0), NATSLM_WGMMA_8(d, 8), NATSLM_WGMMA_8(d, 16), NATSLM_WGMMA_8(d, 24)
      : "l"(a), "l"(b), "r"(int32_t{accumulate}));
}

// d (+)= A * B: A [64][16] in registers, B [16][64] in shared memory with K contiguous.
__device__ inline void wgmma_m64n64k16_rows(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                            bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
      : NATSLM_WGMMA_8(d, 0), NATSLM_WGMMA_8(d, 8), NATSLM_WGMMA_8(d, 16), NATSLM_WGMMA_8(d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int32_t{accumulate}));
}

// d += A * B: A [64][16] in registers, B [16][64] in shared memory with N contiguous.
__device__ inline void wgmma_m64n64k16(float* d, const uint32_t* a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
      : NATSLM_WGMMA_8(d, 0), NATSLM_WGMMA_8(d, 8), NATSLM_WGMMA_8(d, 16), NATSLM_WGMMA_8(d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d += A * B: A [64][16] in registers, B [16][128] in shared memory with N contiguous.
__device__ inline void wgmma_m64n128k16(float* d, const uint32_t* a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
      : NATSLM_WGMMA_8(d, 0), NATSLM_WGMMA_8(d, 8), NATSLM_WGMMA_8(d, 16), NATSLM_WGMMA_8(d, 24),
        NATSLM_WGMMA_8(d, 32), NATSLM_WGMMA_8(d, 40), NATSLM_WGMMA_8(d, 48), NATSLM_WGMMA_8(d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef NATSLM_WGMMA_8

// Four 8 x 8 matrices of bfloat16 from shared memory; lane 8 m + r names row r of matrix m. Lane l
// gets columns 2 (l % 4) + {0, 1} of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row_address)
               : "memory");
}

// The inverse: lane 8 m + r names where row r of matrix m goes.
__device__ inline void store_matrices(uint32_t row_address, const uint32_t (&from)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

// ---- Registers: a warpgroup gives some back or takes some (a multiple of 8, all four warps). ----

// What the warpgroups of a block may hold together, counted in registers of one thread of each: a
// block of `warpgroups` is launched with 65,536 registers / its threads, rounded down to a multiple
// of 8. Asking for more waits for ever.
constexpr int register_pool(int warpgroups) {
  return 65536 / (kWarpgroupThreads * warpgroups) / 8 * 8 * warpgroups;
}

template <int kRegisters>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Memory. ----

// Stores 16 bytes at once. (What is assigned as a uint4 the compiler may store word by word.)
__device__ inline void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// 16 bytes of shared memory.
__device__ inline void load_16_bytes(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// ---- Arithmetic. ----

// 2^x; 0 for -inf, denormals flushed.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to bfloat16; `low` in the lower half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace natslm::kernels::sm90
