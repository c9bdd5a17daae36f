// A row is held in registers by one to eight warps, eight numbers a thread and vector, so each
// array crosses memory once. In the pass back a fixed number of blocks walks over the rows and
// every thread keeps the sums of its columns of dweight; a second kernel adds up the blocks' sums
// in order. SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "natslm/base/error.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/vectors.cuh"
#include "natslm/kernels/fused_norm.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int32_t kMaxWidth = 8192;
// Four blocks on each of 132 multiprocessors. Fixed, so that the bits do not depend on the device.
constexpr int32_t kBackwardBlocks = 528;

// How a row is spread: kWarps warps, kVectors times eight numbers a thread.
template <int kWarpsPerRow, int kVectorsPerThread>
struct Spread {
  static constexpr int kWarps = kWarpsPerRow, kVectors = kVectorsPerThread;
  static constexpr int kBlockWarps = kWarps < 4 ? 4 : kWarps;
  static constexpr int kThreads = 32 * kBlockWarps, kRowsPerBlock = kBlockWarps / kWarps;

  // First of the eight columns of this thread's vector.
  __device__ static int column(int vector) {
    return 8 * (static_cast<int>(threadIdx.x) % (32 * kWarps) + 32 * kWarps * vector);
  }
  __device__ static int row_in_block() { return static_cast<int>(threadIdx.x) / (32 * kWarps); }
};

template <class F>
void with_spread(int32_t width, F&& f) {
  if (width <= 256) return f(Spread<1, 1>{});
  if (width <= 512) return f(Spread<1, 2>{});
  if (width <= 768) return f(Spread<1, 3>{});
  if (width <= 1024) return f(Spread<1, 4>{});
  if (width <= 2048) return f(Spread<4, 2>{});
  if (width <= 4096) return f(Spread<4, 4>{});
  return f(Spread<8, 4>{});
}

template <class S>
__global__ void __launch_bounds__(S::kThreads) forward_kernel(NormForward p) {
  __shared__ float2 scratch[S::kWarps];
  const int64_t row = int64_t{blockIdx.x} * S::kRowsPerBlock + S::row_in_block();
  if (row >= p.rows) return;  // a whole warp, or (several warps a row) the whole block
  const int64_t first = row * p.width;
  const auto* branch = static_cast<const BFloat16*>(p.branch);

  Floats8 x[S::kVectors];
  float total = 0;
#pragma unroll
  for (int i = 0; i < S::kVectors; ++i) {
    const int c = S::column(i);
    x[i] = {};
    if (c < p.width) x[i] = load8(p.x + first + c);
  }
  if (branch) {
    Floats8 added[S::kVectors];  // all loads before the first store, which might alias them
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const int c = S::column(i);
      added[i] = {};
      if (c < p.width) added[i] = load8(branch + first + c);
    }
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const int c = S::column(i);
      if (c >= p.width) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e) x[i].v[e] += added[i].v[e];
      store8(p.sum + first + c, x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < S::kVectors; ++i)
#pragma unroll
    for (int e = 0; e < 8; ++e) total += x[i].v[e];
  const float width = static_cast<float>(p.width);
  const float mean = p.centered ? row_sum<S::kWarps>(float2{total, 0}, scratch).x / width : 0.0f;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < S::kVectors; ++i) {
    if (S::column(i) >= p.width) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) squares += (x[i].v[e] - mean) * (x[i].v[e] - mean);
  }
  const float rstd =
      1.0f / sqrtf(row_sum<S::kWarps>(float2{squares, 0}, scratch).x / width + p.epsilon);
  auto* y = static_cast<BFloat16*>(p.y);
#pragma unroll
  for (int i = 0; i < S::kVectors; ++i) {
    const int c = S::column(i);
    if (c >= p.width) continue;
    const Floats8 weight = load8(p.weight + c);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[i].v[e] = (x[i].v[e] - mean) * rstd * weight.v[e];
    store8(y + first + c, x[i]);
  }
  if (S::column(0) == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads)
    backward_kernel(NormBackward p, float* __restrict__ partial) {
  __shared__ float2 scratch[S::kWarps];
  const float width = static_cast<float>(p.width);
  const auto* dy_rows = static_cast<const BFloat16*>(p.dy);
  auto* dbranch = static_cast<BFloat16*>(p.dbranch);
  Floats8 dweight[S::kVectors] = {};

  const int64_t stride = int64_t{gridDim.x} * S::kRowsPerBlock;
  // Rows beyond the end are skipped by whole warps; with several warps a row, by whole blocks.
  for (int64_t row = int64_t{blockIdx.x} * S::kRowsPerBlock + S::row_in_block(); row < p.rows;
       row += stride) {
    const int64_t first = row * p.width;
    const float mean = p.mean[row], rstd = p.rstd[row];
    Floats8 normed[S::kVectors], g[S::kVectors], residual[S::kVectors];
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const int c = S::column(i);
      normed[i] = g[i] = residual[i] = {};
      if (c >= p.width) continue;
      normed[i] = load8(p.sum + first + c);
      g[i] = load8(dy_rows + first + c);
      if (p.dresidual) residual[i] = load8(p.dresidual + first + c);
    }
    float2 sums = {0, 0};  // of g = weight * dy, of g * normed
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const int c = S::column(i);
      if (c >= p.width) continue;
      const Floats8 weight = load8(p.weight + c);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        normed[i].v[e] = (normed[i].v[e] - mean) * rstd;
        dweight[i].v[e] += g[i].v[e] * normed[i].v[e];
        g[i].v[e] *= weight.v[e];
        sums.x += g[i].v[e];
        sums.y += g[i].v[e] * normed[i].v[e];
      }
    }
    sums = row_sum<S::kWarps>(sums, scratch);
    const float mean_g = p.centered ? sums.x / width : 0.0f, mean_gx = sums.y / width;
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const int c = S::column(i);
      if (c >= p.width) continue;
      Floats8 dx;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        dx.v[e] = residual[i].v[e] + rstd * (g[i].v[e] - mean_g - normed[i].v[e] * mean_gx);
      }
      store8(p.dx + first + c, dx);
      if (dbranch) store8(dbranch + first + c, dx);
    }
  }

  if (!partial) return;
  float* to = partial + int64_t{blockIdx.x} * p.width;
  if constexpr (S::kRowsPerBlock == 1) {
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i) {
      const int c = S::column(i);
      if (c < p.width) store8(to + c, dweight[i]);
    }
  } else {
    __shared__ alignas(16) float rows[S::kRowsPerBlock][256 * S::kWarps * S::kVectors];
#pragma unroll
    for (int i = 0; i < S::kVectors; ++i)
      store8(rows[S::row_in_block()] + S::column(i), dweight[i]);
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < p.width; c += S::kThreads) {
      float sum = rows[0][c];
#pragma unroll
      for (int r = 1; r < S::kRowsPerBlock; ++r) sum += rows[r][c];
      to[c] = sum;
    }
  }
}

constexpr int kReduceColumns = 32, kReduceParts = 16;

// dweight = (accumulate: dweight +) the sum of partial [blocks, width] over its rows.
__global__ void __launch_bounds__(kReduceColumns* kReduceParts)
    reduce_kernel(const float* __restrict__ partial, int32_t blocks, int32_t width,
                  float* __restrict__ dweight, bool accumulate) {
  __shared__ float sums[kReduceParts][kReduceColumns];
  const int column = static_cast<int>(blockIdx.x) * kReduceColumns + static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(threadIdx.y);
  float sum = 0;
  if (column < width) {
#pragma unroll 8
    for (int b = part; b < blocks; b += kReduceParts) sum += partial[int64_t{b} * width + column];
  }
  sums[part][threadIdx.x] = sum;
  __syncthreads();
  if (part != 0 || column >= width) return;
#pragma unroll
  for (int i = 1; i < kReduceParts; ++i) sum += sums[i][threadIdx.x];
  dweight[column] = accumulate ? dweight[column] + sum : sum;
}

template <class Params>
std::string_view why_not_shapes(const Params& p) {
  if (p.rows < 0 || p.width < 1) return "rows must not be negative and width must be positive";
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16";
  if (p.width % 8 != 0 || p.width > kMaxWidth) return "width must be a multiple of 8 up to 8192";
  return "";
}

bool all_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), aligned16);
}

int32_t backward_blocks(const NormBackward& p) {
  int32_t blocks = 0;
  with_spread(p.width, [&]<class S>(S) {
    const int64_t needed = (p.rows + S::kRowsPerBlock - 1) / S::kRowsPerBlock;
    blocks = static_cast<int32_t>(std::clamp<int64_t>(needed, 1, kBackwardBlocks));
  });
  return blocks;
}

}  // namespace

std::string_view why_not(const NormForward& p) {
  if (const auto reason = why_not_shapes(p); !reason.empty()) return reason;
  if (!all_aligned({p.x, p.branch, p.weight, p.sum, p.y})) return "arrays must be 16-byte aligned";
  return "";
}

void run(const NormForward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "norm: ", why_not(p), "; got width ", p.width);
  if (p.rows == 0) return;
  with_spread(p.width, [&]<class S>(S) {
    const int64_t blocks = (p.rows + S::kRowsPerBlock - 1) / S::kRowsPerBlock;
    forward_kernel<S><<<static_cast<uint32_t>(blocks), S::kThreads, 0, stream>>>(p);
  });
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const NormBackward& p) {
  if (const auto reason = why_not_shapes(p); !reason.empty()) return reason;
  if (!all_aligned({p.sum, p.weight, p.dy, p.dresidual, p.dx, p.dbranch, p.workspace}))
    return "arrays must be 16-byte aligned";
  return "";
}

size_t workspace_bytes(const NormBackward& p) {
  return p.dweight ? size_t{4} * backward_blocks(p) * p.width : 0;
}

void run(const NormBackward& p, CUstream_st* stream) {
  NATSLM_CHECK(why_not(p).empty(), "norm: ", why_not(p), "; got width ", p.width);
  const int32_t blocks = backward_blocks(p);
  float* partial = p.dweight ? static_cast<float*>(p.workspace) : nullptr;
  with_spread(p.width, [&]<class S>(S) {
    backward_kernel<S><<<blocks, S::kThreads, 0, stream>>>(p, partial);
  });
  NATSLM_CUDA(cudaGetLastError());
  if (!partial) return;
  const int32_t groups = (p.width + kReduceColumns - 1) / kReduceColumns;
  reduce_kernel<<<groups, dim3(kReduceColumns, kReduceParts), 0, stream>>>(partial, blocks, p.width,
                                                                           p.dweight, p.accumulate);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
