// The definition, in double precision: the oracle of every other backend.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/decode_checks.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double key(const AttentionDecode& p, const CachedKeys& keys, int j, int c) {
  return load(keys.pages[j / kPageKeys], p.dtype, int64_t{c} * kPageKeys + j % kPageKeys);
}

double value(const AttentionDecode& p, const CachedKeys& keys, int j, int c) {
  const int64_t values = int64_t{p.head_dim} * kPageKeys;
  return load(keys.pages[j / kPageKeys], p.dtype, values + int64_t{j % kPageKeys} * p.head_dim + c);
}

// One query of one head. `mass` (double, [count]) takes what the keys receive.
void attend(const AttentionDecode& p, const CachedKeys& keys, int row, int head,
            std::vector<double>& mass) {
  const int64_t at = int64_t{row} * p.q_heads + head;
  const int i = p.row_position[row];
  std::vector<double> score(keys.count, -kInfinity), out(p.head_dim, 0.0);
  std::vector<bool> seen(keys.count, false);
  bool sees = false;
  double highest = -kInfinity;
  for (int j = 0; j < keys.count; ++j) {
    if (!visible(i, keys.position[j], keys.last[j])) continue;
    double sum = 0;
    for (int c = 0; c < p.head_dim; ++c) {
      sum += load(p.q, p.dtype, at * p.head_dim + c) * key(p, keys, j, c);
    }
    score[j] = p.scale * sum;
    seen[j] = sees = true;
    highest = std::max(highest, score[j]);
  }

  double total = 0;
  for (int j = 0; j < keys.count; ++j) {
    if (!seen[j]) continue;  // its value, whatever it is, is not read
    const double weight = std::exp(score[j] - highest);
    total += weight;
    for (int c = 0; c < p.head_dim; ++c) out[c] += weight * value(p, keys, j, c);
  }
  for (int c = 0; c < p.head_dim; ++c) {
    store(p.out, p.dtype, at * p.head_dim + c, sees ? out[c] / total : 0);
  }
  const double lse = sees ? highest + std::log(total) : -kInfinity;
  if (p.lse) p.lse[at] = static_cast<float>(lse);
  for (int j = 0; j < keys.count; ++j) {
    if (seen[j]) mass[j] += std::exp(score[j] - lse);
  }
}

}  // namespace

std::string_view why_not(const AttentionDecode& p) {
  return why_not_decode_shapes(p);
}

void run(const AttentionDecode& p) {
  check_decode_supported("attention_decode (reference)", why_not(p), p);
  const int group = p.q_heads / p.kv_heads;
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    const int b = static_cast<int>(task / p.kv_heads),
              kv_head = static_cast<int>(task % p.kv_heads);
    const CachedKeys& keys = p.keys[task];
    std::vector<double> mass(keys.count, 0.0);
    for (int row = p.row_start[b]; row < p.row_start[b + 1]; ++row) {
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        attend(p, keys, row, head, mass);
      }
    }
    if (keys.mass) std::copy(mass.begin(), mass.end(), keys.mass);
  });
}

}  // namespace natslm::kernels::reference
