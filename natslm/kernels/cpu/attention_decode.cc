// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/decode_checks.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Element>
void attend(const AttentionDecode& p, const CachedKeys& keys, int row, int head) {
  const int d = p.head_dim, i = p.row_position[row];
  const int64_t at = int64_t{row} * p.q_heads + head;
  const Element* q = static_cast<const Element*>(p.q) + at * d;
  std::vector<float> score(keys.count + kPageKeys), out(d, 0.0f);
  float highest = -kInfinity;
  for (int j0 = 0; j0 < keys.count; j0 += kPageKeys) {
    const int n = std::min(kPageKeys, keys.count - j0);
    const auto* page = static_cast<const Element*>(keys.pages[j0 / kPageKeys]);
    float sum[kPageKeys] = {};
    for (int c = 0; c < d; ++c) {
      const float qc = p.scale * float(q[c]);
      for (int j = 0; j < n; ++j) sum[j] += qc * float(page[c * kPageKeys + j]);
    }
    for (int j = 0; j < n; ++j) {
      const bool seen = visible(i, keys.position[j0 + j], keys.last[j0 + j]);
      score[j0 + j] = seen ? sum[j] : -kInfinity;
      highest = std::max(highest, score[j0 + j]);
    }
  }
  float total = 0;
  for (int j = 0; j < keys.count; ++j) {
    if (score[j] == -kInfinity) continue;
    const float weight = std::exp(score[j] - highest);
    total += weight;
    const auto* value = static_cast<const Element*>(keys.pages[j / kPageKeys]) + d * kPageKeys +
                        (j % kPageKeys) * d;
    for (int c = 0; c < d; ++c) out[c] += weight * float(value[c]);
  }
  Element* to = static_cast<Element*>(p.out) + at * d;
  for (int c = 0; c < d; ++c) to[c] = Element(total > 0 ? out[c] / total : 0.0f);
  const float lse = total > 0 ? highest + std::log(total) : -kInfinity;
  if (p.lse) p.lse[at] = lse;
  if (!keys.mass || !(total > 0)) return;
  for (int j = 0; j < keys.count; ++j) keys.mass[j] += std::exp(score[j] - lse);
}

}  // namespace

std::string_view why_not(const AttentionDecode& p) {
  const std::string_view shapes = why_not_decode_shapes(p);
  return shapes.empty() ? why_not_cpu_head_dim(p.head_dim) : shapes;
}

void run(const AttentionDecode& p) {
  check_decode_supported("attention_decode (cpu)", why_not(p), p);
  const int group = p.q_heads / p.kv_heads;
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    const int b = static_cast<int>(task / p.kv_heads),
              kv_head = static_cast<int>(task % p.kv_heads);
    const CachedKeys& keys = p.keys[task];
    if (keys.mass) std::fill_n(keys.mass, keys.count, 0.0f);
    for (int row = p.row_start[b]; row < p.row_start[b + 1]; ++row) {
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        if (p.dtype == DType::kFloat32)
          attend<float>(p, keys, row, head);
        else
          attend<BFloat16>(p, keys, row, head);
      }
    }
  });
}

}  // namespace natslm::kernels::cpu
