// What every backend of attention_decode asks of the parameters.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "natslm/base/error.h"
#include "natslm/kernels/attention_decode.h"

namespace natslm::kernels {

// "" if the sizes fit together.
inline std::string_view why_not_decode_shapes(const AttentionDecode& p) {
  if (p.batch < 0 || p.rows < 0) return "batch and rows must not be negative";
  if (p.q_heads < 1 || p.kv_heads < 1) return "there must be at least one query and one KV head";
  if (p.q_heads % p.kv_heads != 0) return "q_heads must be a multiple of kv_heads";
  if (p.head_dim < 1) return "head_dim must be positive";
  return "";
}

// Throws what why_not(p) says, or if the rows of the sequences do not cover [0, rows).
inline void check_decode_supported(const char* kernel, std::string_view why_not,
                                   const AttentionDecode& p) {
  NATSLM_CHECK(why_not.empty(), kernel, ": ", why_not, "; got batch ", p.batch, ", q_heads ",
               p.q_heads, ", kv_heads ", p.kv_heads, ", rows ", p.rows, ", head_dim ", p.head_dim);
  if (p.batch == 0) return;
  NATSLM_CHECK(p.row_start[0] == 0 && p.row_start[p.batch] == p.rows, kernel,
               ": row_start must go from 0 to rows = ", p.rows, ", got ", p.row_start[0], " .. ",
               p.row_start[p.batch]);
  for (int32_t b = 0; b < p.batch; ++b) {
    NATSLM_CHECK(p.row_start[b] <= p.row_start[b + 1], kernel, ": row_start descends from ",
                 p.row_start[b], " to ", p.row_start[b + 1], " at sequence ", b);
  }
}

}  // namespace natslm::kernels
