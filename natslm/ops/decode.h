// Attention of new queries over cached pages: tensors in, kernels/attention_decode.h out. Inference
// only, so there is no operator schema and no gradient; the cache calls it directly.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "natslm/kernels/attention_decode.h"
#include "natslm/kernels/page_moves.h"

namespace natslm::ops {

// The element type of a tensor or cache. Throws Error for any but float32 and bfloat16.
DType dtype_of(at::ScalarType type);

// q [rows, Hq, D], of the pages' type; row_start [B + 1]; row_position [rows], ascending inside a
// sequence; keys [B * kv_heads], whose `mass` is filled where it is not null. Returns
// [rows, Hq, D] and, if asked for, `lse` [rows, Hq] in float. Throws Error naming what does not
// fit.
at::Tensor attend_pages(const at::Tensor& q, std::span<const int32_t> row_start,
                        std::span<const int32_t> row_position,
                        std::span<const kernels::CachedKeys> keys, int32_t kv_heads, double scale,
                        at::Tensor* lse = nullptr);

// The lists of a step on a GPU: what kernels/attention_decode.h asks for in device memory. Their
// pages have heads of kernels::gpu_head_dim(D) channels, those past D being 0.
struct DeviceLists {
  const kernels::CachedKeys* keys = nullptr;  // [B * kv_heads]
  const int32_t* row_start = nullptr;         // [B + 1]
  const int32_t* row_position = nullptr;      // [rows]
  int32_t max_count = 0;                      // no list has more keys
  bool mass = false;                          // whether any list has a mass
};

// The same on the GPU that q is on, bfloat16. Nothing waits for the device: what `lists` points to
// must stay until the work queued on LibTorch's current stream is done.
at::Tensor attend_pages(const at::Tensor& q, std::span<const int32_t> row_start,
                        const DeviceLists& lists, int32_t kv_heads, double scale,
                        at::Tensor* lse = nullptr);

// x [rows, heads, D], contiguous and with D filled up with zeros to the pages' head size.
at::Tensor gpu_heads(const at::Tensor& x);

// What a cache does to its pages on a GPU, on LibTorch's current stream.
void run_on(const at::Device& device, const kernels::PageUpdate& update);
void run_on(const at::Device& device, const kernels::PageMoves& moves);
void run_on(const at::Device& device, const kernels::PageGather& gather);

}  // namespace natslm::ops
