// Attention for policies that renumber: keys are stored before RoPE, and every query gives the keys
// it can read the positions that the policy says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <span>

#include "natslm/cache/kv_cache.h"
#include "natslm/cache/page_storage.h"

namespace natslm::cache {

// q [rows, Hq, D] before RoPE; lists [B * Hkv], whose mass is filled if the policy wants it.
// Returns [rows, Hq, D].
at::Tensor attend_renumbered(const Policy& policy, PageStorage& storage, const LayerInput& input,
                             std::span<const StepList> lists, const StepRows& rows,
                             const at::Tensor& q);

}  // namespace natslm::cache
