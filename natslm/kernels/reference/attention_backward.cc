// The gradients as attention_backward.h states them, in double precision: the oracle of every other
// backend.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_backward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {
namespace {

using Matrix = std::vector<double>;  // [T, D] of one head

Matrix read(const void* array, DType dtype, const Strides& stride, int b, int head, int length,
            int head_dim) {
  Matrix m(int64_t{length} * head_dim);
  for (int t = 0; t < length; ++t) {
    const int64_t from = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) m[int64_t{t} * head_dim + c] = load(array, dtype, from + c);
  }
  return m;
}

// Rows that `m` does not hold (past the length) become 0.
void write(const Matrix& m, void* array, DType dtype, const Strides& stride, int b, int head,
           int tokens, int head_dim) {
  for (int t = 0; t < tokens; ++t) {
    const int64_t to = row(stride, b, head, t);
    for (int c = 0; c < head_dim; ++c) {
      const size_t from = size_t{static_cast<size_t>(t)} * head_dim + c;
      store(array, dtype, to + c, from < m.size() ? m[from] : 0);
    }
  }
}

double dot(const double* a, const double* b, int n) {
  double sum = 0;
  for (int c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

void add(double* to, double factor, const double* from, int n) {
  for (int c = 0; c < n; ++c) to[c] += factor * from[c];
}

// One KV head of one sequence with the query heads that share it.
void backward_of_group(const AttentionBackward& p, int b, int kv_head) {
  const int length = length_of(p.lengths, b, p.tokens), d = p.head_dim;
  const int group = p.q_heads / p.kv_heads;
  const int64_t kv_row = (int64_t{b} * p.kv_heads + kv_head) * p.tokens;
  const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;
  const int32_t* last = p.last + kv_row;

  const Matrix k = read(p.k, p.dtype, p.k_stride, b, kv_head, length, d);
  const Matrix v = read(p.v, p.dtype, p.v_stride, b, kv_head, length, d);
  Matrix dk(k.size(), 0.0), dv(v.size(), 0.0);
  std::vector<double> sums(int64_t{p.horizon_count} * length, 0.0);

  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Matrix q = read(p.q, p.dtype, p.q_stride, b, head, length, d);
    const Matrix out = read(p.out, p.dtype, p.out_stride, b, head, length, d);
    const Matrix dout = read(p.dout, p.dtype, p.dout_stride, b, head, length, d);
    const int64_t q_row = (int64_t{b} * p.q_heads + head) * p.tokens;
    Matrix dq(q.size(), 0.0);

    for (int i = 0; i < length; ++i) {
      const double lse = p.lse[q_row + i];
      const double role_lse = p.role_lse ? p.role_lse[q_row + i] : lse;
      if (std::isinf(lse) && lse < 0) continue;  // this query sees no key
      const double delta = dot(&dout[i * d], &out[i * d], d);
      for (int j = 0; j <= i; ++j) {
        const double s = p.scale * dot(&q[i * d], &k[j * d], d);
        const double difference = dot(&dout[i * d], &v[j * d], d) - delta;
        if (visible(i, j, last[j])) {
          const double probability = std::exp(s - lse);
          const double ds = probability * difference;
          add(&dv[j * d], probability, &dout[i * d], d);
          add(&dq[i * d], p.scale * ds, &k[j * d], d);
          add(&dk[j * d], p.scale * ds, &q[i * d], d);
        }
        const double factor = std::exp(s - role_lse);
        const double g = (p.limit_factor ? std::min(factor, 1.0) : factor) * difference;
        for (int h = 0; h < p.horizon_count; ++h) {
          if (i <= p.horizons[h * plane + kv_row + j]) sums[int64_t{h} * length + j] += g;
        }
      }
    }
    write(dq, p.dq, p.dtype, p.dq_stride, b, head, p.tokens, d);
  }

  write(dk, p.dk, p.dtype, p.dk_stride, b, kv_head, p.tokens, d);
  write(dv, p.dv, p.dtype, p.dv_stride, b, kv_head, p.tokens, d);
  for (int h = 0; h < p.horizon_count; ++h) {
    for (int j = 0; j < p.tokens; ++j) {
      p.role_sums[h * plane + kv_row + j] =
          j < length ? static_cast<float>(sums[int64_t{h} * length + j]) : 0.0f;
    }
  }
}

}  // namespace

std::string_view why_not(const AttentionBackward& p) {
  const std::string_view shapes = why_not_shapes(p);
  return shapes.empty() ? why_not_horizons(p) : shapes;
}

void run(const AttentionBackward& p) {
  check_supported("attention_backward (reference)", why_not(p), p);
  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t task, int) {
    backward_of_group(p, static_cast<int>(task / p.kv_heads), static_cast<int>(task % p.kv_heads));
  });
}

}  // namespace natslm::kernels::reference
