// Launching the portable kernels: their limits, and the shared memory they ask for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"
#include "natslm/base/error.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/gpu_head_dim.h"

namespace natslm::kernels::cuda {

inline constexpr int32_t kMaxGroup = 8;

// Rows of an array start on 16 bytes, and the distance between two of them in bytes fits 31 bits.
inline bool rows_are_fit(const void* array, const Strides& stride) {
  return stride.token >= 0 && stride.token < int64_t{1} << 30 &&
         reinterpret_cast<uintptr_t>(array) % 16 == 0 && stride.batch % 8 == 0 &&
         stride.head % 8 == 0 && stride.token % 8 == 0;
}

inline constexpr std::string_view kRowsUnfit =
    "rows must start on 16 bytes, less than 2^30 elements apart, on a GPU";

// "" if the GPU kernels take what forward and backward have in common.
template <class Params>
std::string_view why_not_common(const Params& p) {
  if (const std::string_view shapes = why_not_shapes(p); !shapes.empty()) return shapes;
  if (p.dtype != DType::kBFloat16) return "the GPU kernels take bfloat16 only";
  if (!is_gpu_head_dim(p.head_dim)) return "head_dim must be 64, 128 or 256 on a GPU";
  if (p.q_heads / p.kv_heads > kMaxGroup) return "a KV head serves at most 8 query heads on a GPU";
  // Largest scores are found before they are scaled.
  if (!(p.scale > 0)) return "scale must be positive on a GPU";
  if (!rows_are_fit(p.q, p.q_stride) || !rows_are_fit(p.k, p.k_stride) ||
      !rows_are_fit(p.v, p.v_stride) || !rows_are_fit(p.out, p.out_stride)) {
    return kRowsUnfit;
  }
  return "";
}

// Throws what why_not(p) says. (Lengths are in device memory and are not looked at.)
template <class Params>
void check_supported_on_gpu(const char* kernel, std::string_view why_not, const Params& p) {
  NATSLM_CHECK(why_not.empty(), kernel, ": ", why_not, "; got batch ", p.batch, ", q_heads ",
               p.q_heads, ", kv_heads ", p.kv_heads, ", tokens ", p.tokens, ", head_dim ",
               p.head_dim, ", scale ", p.scale);
}

// Views follow one another at multiples of this.
inline constexpr size_t kWorkspaceAlignment = 256;
constexpr size_t aligned_bytes(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Starts `blocks` blocks of `threads` threads with `shared_bytes` of shared memory each.
template <class... Args>
void launch(const char* name, void (*kernel)(Args...), int64_t blocks, int threads,
            size_t shared_bytes, CUstream_st* stream, const Args&... args) {
  if (blocks == 0) return;
  NATSLM_CHECK(blocks < int64_t{1} << 31, name, ": ", blocks,
               " blocks are too many for one launch");
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    int device = 0, limit = 0;
    NATSLM_CUDA(cudaGetDevice(&device));
    NATSLM_CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    NATSLM_CHECK(shared_bytes <= static_cast<size_t>(limit), name, ": needs ", shared_bytes,
                 " bytes of shared memory a block, this device has ", limit);
    NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args...);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
