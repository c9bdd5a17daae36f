// The definition, in double precision: the oracle of every other backend.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double dot(const AttentionForward& p, int64_t q_row, int64_t k_row) {
  double sum = 0;
  for (int c = 0; c < p.head_dim; ++c) {
    sum += load(p.q, p.dtype, q_row + c) * load(p.k, p.dtype, k_row + c);
  }
  return sum;
}

// One query: softmax over the keys it may read, then the mean of their values. Adds the probability
// of key j to mass[j].
void attend(const AttentionForward& p, int b, int head, int i, std::vector<double>& mass) {
  const int kv_head = head / (p.q_heads / p.kv_heads);
  const int32_t* last = p.last + (int64_t{b} * p.kv_heads + kv_head) * p.tokens;
  const int64_t q_row = row(p.q_stride, b, head, i);

  std::vector<double> score(i + 1, -kInfinity);
  double largest = -kInfinity;
  for (int j = 0; j <= i; ++j) {
    if (!visible(i, j, last[j])) continue;
    score[j] = p.scale * dot(p, q_row, row(p.k_stride, b, kv_head, j));
    largest = std::max(largest, score[j]);
  }

  double denominator = 0;
  std::vector<double> mean(p.head_dim, 0.0);
  for (int j = 0; j <= i; ++j) {
    if (!visible(i, j, last[j])) continue;
    score[j] = std::exp(score[j] - largest);
    denominator += score[j];
    const int64_t v_row = row(p.v_stride, b, kv_head, j);
    for (int c = 0; c < p.head_dim; ++c) mean[c] += score[j] * load(p.v, p.dtype, v_row + c);
  }

  const int64_t out_row = row(p.out_stride, b, head, i);
  const double norm = denominator > 0 || std::isnan(denominator) ? 1 / denominator : 0;
  for (int c = 0; c < p.head_dim; ++c) store(p.out, p.dtype, out_row + c, mean[c] * norm);
  for (int j = 0; j <= i; ++j) {
    if (visible(i, j, last[j])) mass[j] += score[j] * norm;
  }
  p.lse[(int64_t{b} * p.q_heads + head) * p.tokens + i] =
      static_cast<float>(denominator == 0 ? -kInfinity : largest + std::log(denominator));
}

}  // namespace

std::string_view why_not(const AttentionForward& p) {
  return why_not_shapes(p);
}

void run(const AttentionForward& p) {
  check_supported("attention_forward (reference)", why_not(p), p);
  const int group = p.q_heads / p.kv_heads;
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    const int b = static_cast<int>(task / p.kv_heads), kv = static_cast<int>(task % p.kv_heads);
    const int length = length_of(p.lengths, b, p.tokens);
    std::vector<double> mass(p.tokens, 0.0);
    for (int head = kv * group; head < (kv + 1) * group; ++head) {
      for (int i = 0; i < length; ++i) attend(p, b, head, i, mass);
      for (int i = length; i < p.tokens; ++i) {
        for (int c = 0; c < p.head_dim; ++c) {
          store(p.out, p.dtype, row(p.out_stride, b, head, i) + c, 0);
        }
        p.lse[(int64_t{b} * p.q_heads + head) * p.tokens + i] = static_cast<float>(-kInfinity);
      }
    }
    if (p.mass) std::copy(mass.begin(), mass.end(), p.mass + task * p.tokens);
  });
}

}  // namespace natslm::kernels::reference
