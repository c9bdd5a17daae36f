// Attention of new queries over cached pages: tensors in, kernels/attention_decode.h out. Inference
// only, so there is no operator schema and no gradient; the cache calls it directly.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "natslm/kernels/attention_decode.h"

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

}  // namespace natslm::ops
