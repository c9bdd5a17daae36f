// What every backend asks of the parameters, whatever it supports beyond that.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "natslm/base/error.h"
#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels {

// "" if the sizes fit together.
template <class Params>
std::string_view why_not_shapes(const Params& p) {
  if (p.batch < 0 || p.tokens < 0) return "batch and tokens must not be negative";
  if (p.q_heads < 1 || p.kv_heads < 1) return "there must be at least one query and one KV head";
  if (p.q_heads % p.kv_heads != 0) return "q_heads must be a multiple of kv_heads";
  if (p.head_dim < 1) return "head_dim must be positive";
  return "";
}

inline std::string_view why_not_horizons(const AttentionBackward& p) {
  if (p.horizon_count < 0 || p.horizon_count > kMaxHorizons) return "horizon_count must be 0 to 4";
  return "";
}

// "" if the fast CPU kernels take this head size.
inline std::string_view why_not_cpu_head_dim(int32_t head_dim) {
  if (head_dim % 8 != 0 || head_dim > 256) return "head_dim must be a multiple of 8 up to 256";
  return "";
}

// Throws what why_not(p) says.
template <class Params>
void check_supported(const char* kernel, std::string_view why_not, const Params& p) {
  NATSLM_CHECK(why_not.empty(), kernel, ": ", why_not, "; got batch ", p.batch, ", q_heads ",
               p.q_heads, ", kv_heads ", p.kv_heads, ", tokens ", p.tokens, ", head_dim ",
               p.head_dim);
  if (!p.lengths) return;
  for (int32_t b = 0; b < p.batch; ++b) {
    NATSLM_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= p.tokens, kernel, ": length ", p.lengths[b],
                 " of sequence ", b, " is not in 0..", p.tokens);
  }
}

}  // namespace natslm::kernels
