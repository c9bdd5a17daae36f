// The yardstick of kernels that multiply on matrix units; see device_attention.h.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"
#include "tests/support/device_attention.h"

namespace natslm::test {
namespace {

using namespace kernels;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float bf16(float x) {
  return static_cast<float>(BFloat16(x));
}

constexpr float kLog2E = 1.4426950408889634f;

// Ways in which kernels on matrix units may differ; any of them may come out nearest to the truth.
struct Manner {
  bool backwards;  // channels are summed from the last to the first
  int turn;        // and begin with this one
  bool units;      // scores are powers of two from the start, with the exponential unit's precision
};
constexpr Manner kManners[] = {{false, 0, false}, {true, 0, true}, {false, 32, true}};

// Of the exponential unit: its largest relative error is 2^-22 (PTX ISA, ex2.approx).
float unit_exp2(float x) {
  const float exact = std::exp2(x);
  return std::isfinite(exact) ? std::bit_cast<float>(std::bit_cast<uint32_t>(exact) & ~3u) : exact;
}

// What scores and their exponentials are made of. The unit for exponentials has base two; its
// argument is a product that was rounded.
struct Scores {
  bool units;
  float factor;
  Scores(float scale, const Manner& m) : units(m.units), factor(units ? scale * kLog2E : scale) {}
  float of(float product) const { return factor * product; }
  // e^(score - largest), and the logarithm of a sum of those.
  float exp_below(float score, float largest) const {
    return units ? unit_exp2(score - largest) : std::exp2((score - largest) * kLog2E);
  }
  float log(float largest, float sum) const {
    return units ? (largest + std::log2(sum)) / kLog2E : largest + std::log(sum);
  }
  float exp(float score, float normaliser) const {
    return exp_below(score, units ? normaliser * kLog2E : normaliser);
  }
};

// Where channel c of n stands in the order of a manner.
int place_of(const Manner& m, int c, int n) {
  const int turned = (c + m.turn) % n;
  return m.backwards ? n - 1 - turned : turned;
}

// Toward zero.
float cut(double x) {
  const float near = static_cast<float>(x);
  return std::abs(static_cast<double>(near)) > std::abs(x) ? std::nextafter(near, 0.0f) : near;
}

// [length, D] of one head.
std::vector<float> read(const void* array, DType dtype, const Strides& stride, int b, int head,
                        int length, int head_dim, const Manner& manner) {
  std::vector<float> m(int64_t{length} * head_dim);
  for (int t = 0; t < length; ++t) {
    const int64_t from = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) {
      const int to = place_of(manner, c, head_dim);
      m[int64_t{t} * head_dim + to] = static_cast<float>(load(array, dtype, from + c));
    }
  }
  return m;
}

// Rows that `m` does not hold become 0.
void write(const std::vector<float>& m, void* array, DType dtype, const Strides& stride, int b,
           int head, int tokens, int head_dim, float factor, const Manner& manner) {
  for (int t = 0; t < tokens; ++t) {
    const int64_t to = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) {
      const size_t from = size_t(t) * head_dim + place_of(manner, c, head_dim);
      store(array, dtype, to + c, from < m.size() ? factor * m[from] : 0);
    }
  }
}

void add(float* to, float factor, const float* from, int n) {
  for (int c = 0; c < n; ++c) to[c] += factor * from[c];
}

void forward_of_head(const AttentionForward& p, const Manner& manner, int b, int head) {
  const int d = p.head_dim, kv = head / (p.q_heads / p.kv_heads);
  const int length = length_of(p.lengths, b, p.tokens);
  const Scores scores(p.scale, manner);
  const int64_t kv_row = (int64_t{b} * p.kv_heads + kv) * p.tokens;
  const int32_t* last = p.last + kv_row;
  const auto q = read(p.q, p.dtype, p.q_stride, b, head, length, d, manner);
  const auto k = read(p.k, p.dtype, p.k_stride, b, kv, length, d, manner);
  const auto v = read(p.v, p.dtype, p.v_stride, b, kv, length, d, manner);
  std::vector<float> out(q.size(), 0.0f), score(length);
  float* lse = p.lse + (int64_t{b} * p.q_heads + head) * p.tokens;
  std::fill_n(lse, p.tokens, -kInfinity);
  for (int64_t i = 0; i < length; ++i) {
    float largest = -kInfinity, sum = 0;
    for (int64_t j = 0; j <= i; ++j) {
      if (!visible(i, j, last[j])) continue;
      score[j] = scores.of(matrix_unit_dot(&q[i * d], &k[j * d], d));
      largest = std::max(largest, score[j]);
    }
    for (int64_t j = 0; j <= i; ++j) {
      if (!visible(i, j, last[j])) continue;
      const float probability = scores.exp_below(score[j], largest);
      sum += probability;
      add(&out[i * d], bf16(probability), &v[j * d], d);
    }
    if (sum > 0) lse[i] = scores.log(largest, sum);
    for (int c = 0; c < d; ++c) out[i * d + c] *= sum > 0 ? 1 / sum : 0;
    for (int64_t j = 0; p.mass && j <= i; ++j) {
      if (visible(i, j, last[j])) p.mass[kv_row + j] += scores.exp(score[j], lse[i]);
    }
  }
  write(out, p.out, p.dtype, p.out_stride, b, head, p.tokens, d, 1, manner);
}

void backward_of_group(const AttentionBackward& p, const Manner& manner, int b, int kv) {
  const Scores scores(p.scale, manner);
  const int length = length_of(p.lengths, b, p.tokens), d = p.head_dim;
  const int group = p.q_heads / p.kv_heads;
  const int64_t kv_row = (int64_t{b} * p.kv_heads + kv) * p.tokens;
  const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;
  const int32_t* last = p.last + kv_row;
  const auto k = read(p.k, p.dtype, p.k_stride, b, kv, length, d, manner);
  const auto v = read(p.v, p.dtype, p.v_stride, b, kv, length, d, manner);
  std::vector<float> dk(k.size(), 0.0f), dv(v.size(), 0.0f);
  for (int h = 0; h < p.horizon_count; ++h) {
    std::fill_n(p.role_sums + h * plane + kv_row, p.tokens, 0.0f);
  }
  for (int head = kv * group; head < (kv + 1) * group; ++head) {
    const auto q = read(p.q, p.dtype, p.q_stride, b, head, length, d, manner);
    const auto out = read(p.out, p.dtype, p.out_stride, b, head, length, d, manner);
    const auto dout = read(p.dout, p.dtype, p.dout_stride, b, head, length, d, manner);
    const int64_t q_row = (int64_t{b} * p.q_heads + head) * p.tokens;
    std::vector<float> dq(q.size(), 0.0f);
    for (int64_t i = 0; i < length; ++i) {
      const float lse = p.lse[q_row + i];
      const float role_lse = p.role_lse ? p.role_lse[q_row + i] : lse;
      if (std::isinf(lse) && lse < 0) continue;
      float delta = 0;
      for (int c = 0; c < d; ++c) delta += dout[i * d + c] * out[i * d + c];
      for (int64_t j = 0; j <= i; ++j) {
        const bool seen = visible(i, j, last[j]);
        if (!seen && p.horizon_count == 0) continue;
        const float s = scores.of(matrix_unit_dot(&q[i * d], &k[j * d], d));
        const float difference = matrix_unit_dot(&dout[i * d], &v[j * d], d) - delta;
        if (seen) {
          const float probability = scores.exp(s, lse), ds = bf16(probability * difference);
          add(&dv[j * d], bf16(probability), &dout[i * d], d);
          add(&dq[i * d], ds, &k[j * d], d);
          add(&dk[j * d], ds, &q[i * d], d);
        }
        if (p.horizon_count == 0) continue;
        const float factor = scores.exp(s, role_lse);
        const float g = (p.limit_factor ? std::min(factor, 1.0f) : factor) * difference;
        for (int h = 0; h < p.horizon_count; ++h) {
          const int64_t at = h * plane + kv_row + j;
          if (i <= p.horizons[at]) p.role_sums[at] += g;
        }
      }
    }
    write(dq, p.dq, p.dtype, p.dq_stride, b, head, p.tokens, d, p.scale, manner);
  }
  write(dk, p.dk, p.dtype, p.dk_stride, b, kv, p.tokens, d, p.scale, manner);
  write(dv, p.dv, p.dtype, p.dv_stride, b, kv, p.tokens, d, 1, manner);
}

}  // namespace

float matrix_unit_dot(const float* a, const float* b, int n) {
  constexpr int kPairs = 16;     // multiplied and added at once
  constexpr int kFraction = 24;  // bits kept below the largest exponent
  float sum = 0;
  for (int begin = 0; begin < n; begin += kPairs) {
    float term[kPairs + 1] = {sum};
    const int pairs = std::min(kPairs, n - begin);
    uint32_t exponent = 0;
    for (int c = 0; c < pairs; ++c) term[1 + c] = a[begin + c] * b[begin + c];  // exact from bf16
    for (const float t : term) {
      exponent = std::max(exponent, std::bit_cast<uint32_t>(t) & 0x7f800000u);
    }
    if (exponent == 0) continue;
    // 2^(largest exponent - kFraction), by its bits as a double.
    const double unit =
        std::bit_cast<double>((uint64_t{exponent >> 23} + (1023 - 127 - kFraction)) << 52);
    int64_t total = 0;
    for (const float t : term) total += static_cast<int64_t>(t * (1 / unit));
    sum = cut(static_cast<double>(total) * unit);
  }
  return sum;
}

namespace {

void forward(const AttentionForward& p, const Manner& manner) {
  if (p.mass) std::fill_n(p.mass, int64_t{p.batch} * p.kv_heads * p.tokens, 0.0f);
  for (int b = 0; b < p.batch; ++b) {
    for (int head = 0; head < p.q_heads; ++head) forward_of_head(p, manner, b, head);
  }
}

void backward(const AttentionBackward& p, const Manner& manner) {
  for (int b = 0; b < p.batch; ++b) {
    for (int kv = 0; kv < p.kv_heads; ++kv) backward_of_group(p, manner, b, kv);
  }
}

}  // namespace

template <int kManner>
void matrix_unit_forward(const AttentionForward& p) {
  forward(p, kManners[kManner]);
}
template <int kManner>
void matrix_unit_backward(const AttentionBackward& p) {
  backward(p, kManners[kManner]);
}
static_assert(std::size(kManners) == kMatrixUnitManners);
template void matrix_unit_forward<0>(const AttentionForward&);
template void matrix_unit_forward<1>(const AttentionForward&);
template void matrix_unit_forward<2>(const AttentionForward&);
template void matrix_unit_backward<0>(const AttentionBackward&);
template void matrix_unit_backward<1>(const AttentionBackward&);
template void matrix_unit_backward<2>(const AttentionBackward&);

}  // namespace natslm::test
