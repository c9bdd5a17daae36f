// Eight numbers at a time between memory and registers, in the 16-byte accesses that reach the full
// bandwidth, and sums over the threads that share a row. All arithmetic is in float.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "natslm/base/dtype.h"

namespace natslm::kernels::cuda {

struct Floats8 {
  float v[8];
};

__device__ inline Floats8 unpack(uint4 raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Floats8 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.v[2 * i] = __uint_as_float(words[i] << 16);
    x.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return x;
}

// The first of a pair goes into the low half.
__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint4 pack(const Floats8& x) {
  return {pack(x.v[0], x.v[1]), pack(x.v[2], x.v[3]), pack(x.v[4], x.v[5]), pack(x.v[6], x.v[7])};
}

__device__ inline Floats8 load8(const BFloat16* from) {
  return unpack(*reinterpret_cast<const uint4*>(from));
}

__device__ inline Floats8 load8(const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0],
               b = reinterpret_cast<const float4*>(from)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ inline void store8(BFloat16* to, const Floats8& x) {
  *reinterpret_cast<uint4*>(to) = pack(x);
}

__device__ inline void store8(float* to, const Floats8& x) {
  reinterpret_cast<float4*>(to)[0] = {x.v[0], x.v[1], x.v[2], x.v[3]};
  reinterpret_cast<float4*>(to)[1] = {x.v[4], x.v[5], x.v[6], x.v[7]};
}

// Sum over the warp, the same bits in every lane: butterfly order is symmetric.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Sums two numbers over kWarps warps that share a row; `scratch` is theirs alone. With more than
// one warp all of them must call it, and they are the whole block.
template <int kWarps>
__device__ inline float2 row_sum(float2 x, float2* scratch) {
  x = {warp_sum(x.x), warp_sum(x.y)};
  if constexpr (kWarps > 1) {
    __syncthreads();  // the sums before may still be read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      x.x += scratch[i].x;
      x.y += scratch[i].y;
    }
  }
  return x;
}

inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace natslm::kernels::cuda
