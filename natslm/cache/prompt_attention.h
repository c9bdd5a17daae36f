// Attention of a whole prompt on a GPU. The step that begins a sequence brings all the keys its
// queries can read, one after the other and not yet scattered over pages: the kernels of a training
// pass then do in full tiles what the kernel over pages would do key by key.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace natslm::cache {

// Shorter beginnings are left to the kernel over pages. A sequence's own rows alone decide, so that
// its result does not depend on what else is in a step.
inline constexpr int32_t kPromptRows = 256;

// The keys of several lists as kernels::KeyOrder (attention_forward.h) has them.
struct PromptOrder {
  std::vector<int32_t> order, ends;  // [lists, keys], [lists, KeyOrder::kSegments]; empty: these
                                     // lifetimes have no such order
  int32_t reach = 0;
  double density = 1;  // share of the causal pairs that are visible
};
// last[list][j]: lifetime of the key at position j; lists of equal length.
PromptOrder prompt_order(std::span<const std::span<const int32_t>> last);

// q [keys, Hq, D], k and v [keys, Hkv, D] of one sequence at positions 0 .. keys - 1, bfloat16 on a
// GPU; last[Hkv]. Returns [keys, Hq, D].
at::Tensor attend_prompt(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         std::span<const std::span<const int32_t>> last, double scale);

}  // namespace natslm::cache
