// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> read(const void* array, DType dtype, const Strides& stride, int b, int head,
                        int length, int head_dim) {
  std::vector<float> m(int64_t{length} * head_dim);
  for (int t = 0; t < length; ++t) {
    const int64_t from = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) {
      m[int64_t{t} * head_dim + c] = static_cast<float>(load(array, dtype, from + c));
    }
  }
  return m;
}

float dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

}  // namespace

std::string_view why_not(const AttentionForward& p) {
  const std::string_view shapes = why_not_shapes(p);
  return shapes.empty() ? why_not_cpu_head_dim(p.head_dim) : shapes;
}

void run(const AttentionForward& p) {
  check_supported("attention_forward (cpu)", why_not(p), p);
  const int d = p.head_dim, group = p.q_heads / p.kv_heads;
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    const int b = static_cast<int>(task / p.kv_heads), kv = static_cast<int>(task % p.kv_heads);
    const int length = length_of(p.lengths, b, p.tokens);
    const int32_t* last = p.last + task * p.tokens;
    const auto k = read(p.k, p.dtype, p.k_stride, b, kv, length, d);
    const auto v = read(p.v, p.dtype, p.v_stride, b, kv, length, d);
    std::vector<float> score(length), mean(d);
    if (p.mass) std::fill_n(p.mass + task * p.tokens, p.tokens, 0.0f);
    for (int head = kv * group; head < (kv + 1) * group; ++head) {
      const auto q = read(p.q, p.dtype, p.q_stride, b, head, length, d);
      float* lse = p.lse + (int64_t{b} * p.q_heads + head) * p.tokens;
      for (int i = 0; i < p.tokens; ++i) {
        std::fill(mean.begin(), mean.end(), 0.0f);
        float largest = -kInfinity, denominator = 0;
        for (int j = 0; i < length && j <= i; ++j) {
          if (!visible(i, j, last[j])) continue;
          score[j] = p.scale * dot(&q[int64_t{i} * d], &k[int64_t{j} * d], d);
          largest = std::max(largest, score[j]);
        }
        for (int j = 0; i < length && j <= i; ++j) {
          if (!visible(i, j, last[j])) continue;
          score[j] = std::exp(score[j] - largest);
          denominator += score[j];
          for (int c = 0; c < d; ++c) mean[c] += score[j] * v[int64_t{j} * d + c];
        }
        lse[i] = denominator == 0 ? -kInfinity : largest + std::log(denominator);
        const float norm = denominator == 0 ? 0 : 1 / denominator;
        for (int c = 0; c < d; ++c) {
          store(p.out, p.dtype, row(p.out_stride, b, head, i) + c, mean[c] * norm);
        }
        for (int j = 0; p.mass && i < length && j <= i; ++j) {
          if (visible(i, j, last[j])) p.mass[task * p.tokens + j] += score[j] * norm;
        }
      }
    }
  });
}

}  // namespace natslm::kernels::cpu
