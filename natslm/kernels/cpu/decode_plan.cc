// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/cpu/decode_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::cpu {
namespace {

int32_t packed_rows(const AttentionDecode& p, int32_t list) {
  const int32_t b = list / p.kv_heads;
  return (p.row_start[b + 1] - p.row_start[b]) * (p.q_heads / p.kv_heads);
}

}  // namespace

DecodePlan plan_decode(const AttentionDecode& p) {
  DecodePlan plan;
  for (int32_t list = 0; list < p.batch * p.kv_heads; ++list) {
    const int32_t rows = packed_rows(p, list), count = p.keys[list].count;
    if (rows > kDecodeBlockRows || count <= kDecodePieceKeys) {
      for (int32_t row = 0; row < rows; row += kDecodeBlockRows) {
        plan.tasks.push_back({list, row, std::min(kDecodeBlockRows, rows - row), 0, count, -1});
      }
      continue;
    }
    const int64_t begin = static_cast<int64_t>(plan.tasks.size());
    for (int32_t key = 0; key < count; key += kDecodePieceKeys) {
      const int32_t end = std::min(count, key + kDecodePieceKeys);
      plan.tasks.push_back({list, 0, rows, key, end, plan.partial_floats});
      plan.partial_floats += int64_t{rows} * (p.head_dim + 2);
    }
    plan.cuts.push_back({begin, static_cast<int64_t>(plan.tasks.size())});
  }
  return plan;
}

std::vector<DecodeTask> plan_mass(const AttentionDecode& p) {
  std::vector<DecodeTask> tasks;
  for (int32_t list = 0; list < p.batch * p.kv_heads; ++list) {
    if (!p.keys[list].mass) continue;
    for (int32_t key = 0; key < p.keys[list].count; key += kDecodePieceKeys) {
      const int32_t end = std::min(p.keys[list].count, key + kDecodePieceKeys);
      tasks.push_back({list, 0, packed_rows(p, list), key, end, -1});
    }
  }
  return tasks;
}

float attend_row_exactly(const AttentionDecode& p, int32_t list, int64_t at, int32_t position) {
  const CachedKeys& keys = p.keys[list];
  const int64_t d = p.head_dim;
  std::vector<double> score(keys.count), out(d, 0.0);
  double highest = -std::numeric_limits<double>::infinity(), total = 0;
  bool sees = false;
  for (int32_t j = 0; j < keys.count; ++j) {
    if (!visible(position, keys.position[j], keys.last[j])) continue;
    for (int64_t c = 0; c < d; ++c) {
      score[j] += load(p.q, p.dtype, at * d + c) *
                  load(keys.pages[j / kPageKeys], p.dtype, c * kPageKeys + j % kPageKeys);
    }
    score[j] *= p.scale;
    sees = true;
    highest = std::max(highest, score[j]);
  }
  for (int32_t j = 0; j < keys.count; ++j) {
    if (!visible(position, keys.position[j], keys.last[j])) continue;
    const double weight = std::exp(score[j] - highest);
    total += weight;
    const int64_t value = (kPageKeys + j % kPageKeys) * d;
    for (int64_t c = 0; c < d; ++c) {
      out[c] += weight * load(keys.pages[j / kPageKeys], p.dtype, value + c);
    }
  }
  for (int64_t c = 0; c < d; ++c) store(p.out, p.dtype, at * d + c, sees ? out[c] / total : 0);
  return static_cast<float>(highest + std::log(total));
}

}  // namespace natslm::kernels::cpu
