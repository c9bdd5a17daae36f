// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"
#include "tests/support/attention_case.h"

namespace natslm::test {
namespace {

using namespace kernels;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> read(const void* array, DType dtype, const Strides& stride, int b, int head,
                        int length, int head_dim, bool backwards) {
  std::vector<float> m(int64_t{length} * head_dim);
  for (int t = 0; t < length; ++t) {
    const int64_t from = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) {
      const int channel = backwards ? head_dim - 1 - c : c;
      m[int64_t{t} * head_dim + c] = static_cast<float>(load(array, dtype, from + channel));
    }
  }
  return m;
}

void write(const std::vector<float>& m, void* array, DType dtype, const Strides& stride, int b,
           int head, int tokens, int head_dim, bool backwards) {
  for (int t = 0; t < tokens; ++t) {
    const int64_t to = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) {
      const size_t from = size_t(t) * head_dim + c;
      store(array, dtype, to + (backwards ? head_dim - 1 - c : c), from < m.size() ? m[from] : 0);
    }
  }
}

float dot(const float* a, const float* b, int n) {
  float sum = 0;
  for (int c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

void add(float* to, float factor, const float* from, int n) {
  for (int c = 0; c < n; ++c) to[c] += factor * from[c];
}

void backward_of_group(const AttentionBackward& p, int b, int kv_head, bool backwards) {
  const int length = length_of(p.lengths, b, p.tokens), d = p.head_dim;
  const int group = p.q_heads / p.kv_heads;
  const int64_t kv_row = (int64_t{b} * p.kv_heads + kv_head) * p.tokens;
  const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;
  const int32_t* last = p.last + kv_row;
  const auto k = read(p.k, p.dtype, p.k_stride, b, kv_head, length, d, backwards);
  const auto v = read(p.v, p.dtype, p.v_stride, b, kv_head, length, d, backwards);
  std::vector<float> dk(k.size(), 0.0f), dv(v.size(), 0.0f);
  for (int h = 0; h < p.horizon_count; ++h) {
    std::fill_n(p.role_sums + h * plane + kv_row, p.tokens, 0.0f);
  }
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const auto q = read(p.q, p.dtype, p.q_stride, b, head, length, d, backwards);
    const auto out = read(p.out, p.dtype, p.out_stride, b, head, length, d, backwards);
    const auto dout = read(p.dout, p.dtype, p.dout_stride, b, head, length, d, backwards);
    const int64_t q_row = (int64_t{b} * p.q_heads + head) * p.tokens;
    std::vector<float> dq(q.size(), 0.0f);
    for (int64_t i = 0; i < length; ++i) {
      const float lse = p.lse[q_row + i];
      const float role_lse = p.role_lse ? p.role_lse[q_row + i] : lse;
      if (std::isinf(lse) && lse < 0) continue;
      const float delta = dot(&dout[i * d], &out[i * d], d);
      for (int64_t j = 0; j <= i; ++j) {
        const bool seen = visible(i, j, last[j]);
        if (!seen && p.horizon_count == 0) continue;
        const float s = p.scale * dot(&q[i * d], &k[j * d], d);
        const float difference = dot(&dout[i * d], &v[j * d], d) - delta;
        if (seen) {
          const float probability = std::exp(s - lse);
          add(&dv[j * d], probability, &dout[i * d], d);
          add(&dq[i * d], p.scale * probability * difference, &k[j * d], d);
          add(&dk[j * d], p.scale * probability * difference, &q[i * d], d);
        }
        if (p.horizon_count == 0) continue;
        const float factor = std::exp(s - role_lse);
        const float g = (p.limit_factor ? std::min(factor, 1.0f) : factor) * difference;
        for (int h = 0; h < p.horizon_count; ++h) {
          const int64_t at = h * plane + kv_row + j;
          if (i <= p.horizons[at]) p.role_sums[at] += g;
        }
      }
    }
    write(dq, p.dq, p.dtype, p.dq_stride, b, head, p.tokens, d, backwards);
  }
  write(dk, p.dk, p.dtype, p.dk_stride, b, kv_head, p.tokens, d, backwards);
  write(dv, p.dv, p.dtype, p.dv_stride, b, kv_head, p.tokens, d, backwards);
}

void forward(const AttentionForward& p, bool backwards) {
  const int d = p.head_dim, group = p.q_heads / p.kv_heads;
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    const int b = static_cast<int>(task / p.kv_heads), kv = static_cast<int>(task % p.kv_heads);
    const int length = length_of(p.lengths, b, p.tokens);
    const int32_t* last = p.last + task * p.tokens;
    const auto k = read(p.k, p.dtype, p.k_stride, b, kv, length, d, backwards);
    const auto v = read(p.v, p.dtype, p.v_stride, b, kv, length, d, backwards);
    std::vector<float> score(length), mean(d);
    if (p.mass) std::fill_n(p.mass + task * p.tokens, p.tokens, 0.0f);
    for (int head = kv * group; head < (kv + 1) * group; ++head) {
      const auto q = read(p.q, p.dtype, p.q_stride, b, head, length, d, backwards);
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
          store(p.out, p.dtype, row(p.out_stride, b, head, i) + (backwards ? d - 1 - c : c),
                mean[c] * norm);
        }
        // As the contract says: from the stored normaliser.
        for (int j = 0; p.mass && i < length && j <= i; ++j) {
          if (!visible(i, j, last[j])) continue;
          const float s = p.scale * dot(&q[int64_t{i} * d], &k[int64_t{j} * d], d);
          p.mass[task * p.tokens + j] += std::exp(s - lse[i]);
        }
      }
    }
  });
}

void backward(const AttentionBackward& p, bool backwards) {
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    backward_of_group(p, static_cast<int>(task / p.kv_heads), static_cast<int>(task % p.kv_heads),
                      backwards);
  });
}

}  // namespace

void plain_forward(const AttentionForward& p) {
  forward(p, false);
}
void plain_forward_again(const AttentionForward& p) {
  forward(p, true);
}
void plain_backward(const AttentionBackward& p) {
  backward(p, false);
}
void plain_backward_again(const AttentionBackward& p) {
  backward(p, true);
}

}  // namespace natslm::test
