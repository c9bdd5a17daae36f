// The role of one chunk from its logits: what the CPU and the GPU run alike, so that both choose
// the same roles bit for bit. Nothing here may be contracted into other multiply-adds than those
// written; the files that include it are compiled so.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "natslm/base/dtype.h"
#include "natslm/base/lifetime.h"
#include "natslm/roles/gumbel.h"
#include "natslm/roles/roles.h"

namespace natslm::roles {

using Triple = std::array<float, kRoles>;

NATSLM_HD inline float load_logit(const void* logits, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(logits)[index];
  return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(logits)[index]} << 16);
}

// Means of the logits of a chunk of c tokens; `first` is the index of the first token's Global
// logit.
NATSLM_HD inline Triple chunk_logits(const void* logits, DType dtype, int64_t first,
                                     int64_t token_stride, int32_t c) {
  Triple sum;
  for (int role = 0; role < kRoles; ++role) sum[role] = load_logit(logits, dtype, first + role);
  if (c == 1) return sum;
  for (int32_t t = 1; t < c; ++t) {
    first += token_stride;
    for (int role = 0; role < kRoles; ++role) sum[role] += load_logit(logits, dtype, first + role);
  }
  for (int role = 0; role < kRoles; ++role) sum[role] /= static_cast<float>(c);
  return sum;
}

struct RoleChoice {
  Role used;      // with bias and, if sampling, noise
  Role plain;     // argmax of the logits alone
  Triple scores;  // logits + bias + noise, if sampling
};

NATSLM_HD inline RoleChoice choose_role(const Triple& logits, RoleSet set, float bias) {
  return {best_role(logits.data(), set, bias), best_role(logits.data(), set), logits};
}

NATSLM_HD inline RoleChoice sample_role(const Triple& logits, RoleSet set, float bias,
                                        const Triple& noise) {
  Triple scores = logits;
  scores[kSliding] += bias;
  for (int role = 0; role < kRoles; ++role) scores[role] += noise[role];
  return {best_role(scores.data(), set), best_role(logits.data(), set), scores};
}

// Softmax over the allowed roles, 0 for the others. (Only the gradient sees it: the exponential is
// the device's own.)
NATSLM_HD inline Triple softmax(const Triple& scores, RoleSet set) {
  float top = scores[kGlobal];
  for (const Role role : {kLocal, kSliding}) {
    if (allows(set, role) && scores[role] > top) top = scores[role];
  }
  Triple p = {};
  float sum = 0;
  for (const Role role : {kGlobal, kLocal, kSliding}) {
    if (!allows(set, role)) continue;
    p[role] = std::exp(scores[role] - top);
    sum += p[role];
  }
  for (int role = 0; role < kRoles; ++role) p[role] /= sum;
  return p;
}

}  // namespace natslm::roles
