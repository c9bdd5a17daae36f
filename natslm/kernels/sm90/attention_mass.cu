// Attention mass per key: the scores once more, this time with keys as rows, so that a block owns
// its keys' sums. mma.sync on purpose: it serves policies that look at attention now and then.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/sm90/attention_forward.h"
#include "natslm/kernels/sm90/hopper.cuh"

namespace natslm::kernels::sm90 {
namespace {

constexpr int kMassKeys = 64;  // of a block: 16 for each of 4 warps
constexpr int kMassRows = 64;  // queries times heads at a time; position-major
constexpr int kMassThreads = 128;
constexpr int kNoQuery = -1;  // a position that sees no key

template <int kHeadDim>
struct MassShared {
  // 16 bytes more a row than needed: the rows of a fragment then lie in different banks.
  alignas(16) __nv_bfloat16 q[kMassRows][kHeadDim + 8];
  int32_t query[kMassRows];  // position, or kNoQuery
  float lse_log2[kMassRows];
  int32_t first_query, last_query;  // that see a key of the block
};

// d += A * B, [16][16] by [16][8].
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t load_pair(const __nv_bfloat16* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}

// Rows [first_row, first_row + kMassRows) of the group's queries, those up to last_query.
template <int kHeadDim>
__device__ void load_rows(const MassArguments& a, MassShared<kHeadDim>& shared, int32_t batch,
                          int32_t kv_head, int32_t first_row) {
  constexpr int kChunks = kHeadDim / 8;
  for (int i = threadIdx.x; i < kMassRows * kChunks; i += kMassThreads) {
    const int32_t row = i / kChunks, chunk = i % kChunks;
    const int32_t position = (first_row + row) / a.group;
    const int32_t head = kv_head * a.group + (first_row + row) % a.group;
    const bool exists = position <= shared.last_query;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (exists) {
      bits =
          *reinterpret_cast<const uint4*>(a.q + batch * a.q_stride.batch + head * a.q_stride.head +
                                          position * a.q_stride.token + 8 * chunk);
    }
    *reinterpret_cast<uint4*>(&shared.q[row][8 * chunk]) = bits;
    if (chunk == 0) {
      shared.query[row] = exists ? position : kNoQuery;
      const int64_t q_head = int64_t{batch} * a.kv_heads * a.group + head;
      shared.lse_log2[row] = exists ? a.lse[q_head * a.tokens + position] * 1.44269504f : 0;
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kMassThreads) attention_mass_kernel(const MassArguments a) {
  __shared__ MassShared<kHeadDim> shared;
  const int32_t batch = blockIdx.z, kv_head = blockIdx.y;
  const int64_t head_offset = (int64_t{batch} * a.kv_heads + kv_head) * a.tokens;
  const int32_t length = a.lengths ? a.lengths[batch] : a.tokens;
  const int32_t lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  if (threadIdx.x == 0) {
    shared.first_query = kMaxPosition;
    shared.last_query = -1;
  }
  __syncthreads();

  // This thread's two keys: rows lane / 4 and 8 further down of the warp's 16.
  int32_t place[2], position[2], last[2];
  float sum[2] = {0, 0};
  uint32_t k[kHeadDim / 16][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    place[i] = blockIdx.x * kMassKeys + warp * 16 + lane / 4 + 8 * i;
    const bool exists = place[i] < length;
    position[i] = exists && a.position ? a.position[head_offset + place[i]] : place[i];
    last[i] = exists ? a.last[head_offset + place[i]] : -1;
    if (last[i] >= position[i]) {
      atomicMin(&shared.first_query, position[i]);
      atomicMax(&shared.last_query, min(last[i], length - 1));
    }
    const __nv_bfloat16* row = a.k + batch * a.k_stride.batch + kv_head * a.k_stride.head +
                               place[i] * a.k_stride.token + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      k[step][i] = exists ? load_pair(row + 16 * step) : 0;
      k[step][i + 2] = exists ? load_pair(row + 16 * step + 8) : 0;
    }
  }
  __syncthreads();

  const int32_t end_query = shared.last_query + 1;  // 0: no key is ever seen
  for (int32_t row = min(shared.first_query, end_query) * a.group; row < end_query * a.group;
       row += kMassRows) {
    load_rows(a, shared, batch, kv_head, row);
    __syncthreads();
#pragma unroll 1
    for (int block = 0; block < kMassRows / 8; ++block) {
      float scores[4] = {};
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const __nv_bfloat16* q = &shared.q[8 * block + lane / 4][16 * step + lane % 4 * 2];
        multiply(scores, k[step], load_pair(q), load_pair(q + 8));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t column = 8 * block + lane % 4 * 2 + i % 2;
        if (visible(shared.query[column], position[i / 2], last[i / 2])) {
          sum[i / 2] += exp2_fast(fmaf(scores[i], a.scale_log2, -shared.lse_log2[column]));
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sum[i] + __shfl_xor_sync(~0u, sum[i], 1);
    total += __shfl_xor_sync(~0u, total, 2);
    // Places past the length are positions past it: the order permutes what comes before.
    const int32_t key = place[i] < length ? position[i] : place[i];
    if (lane % 4 == 0 && place[i] < a.tokens) a.mass[head_offset + key] = total;
  }
}

}  // namespace

void launch_attention_mass(const MassArguments& a, CUstream_st* stream) {
  const dim3 grid((a.tokens + kMassKeys - 1) / kMassKeys, a.kv_heads, a.batch);
  if (a.head_dim == 64) {
    attention_mass_kernel<64><<<grid, kMassThreads, 0, stream>>>(a);
  } else {
    attention_mass_kernel<128><<<grid, kMassThreads, 0, stream>>>(a);
  }
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::sm90
