// Attention for policies that renumber: keys are stored before RoPE, and every query gives the keys
// it can read the positions that the policy says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <span>

#include "natslm/cache/kv_cache.h"
#include "natslm/kernels/attention_decode.h"

namespace natslm::cache {

// q [rows, Hq, D] before RoPE; row_start [B + 1]; row_position [rows]; keys [B * Hkv], whose mass
// is filled where it is not null. Returns [rows, Hq, D].
at::Tensor attend_renumbered(const Policy& policy, const Rotate& rotate, int32_t rotary_positions,
                             const at::Tensor& q, std::span<const int32_t> row_start,
                             std::span<const int32_t> row_position,
                             std::span<const kernels::CachedKeys> keys, int32_t kv_heads,
                             double scale);

}  // namespace natslm::cache
