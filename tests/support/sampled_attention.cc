// SPDX-License-Identifier: Apache-2.0
#include "tests/support/sampled_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "natslm/base/lifetime.h"

namespace natslm::test {
namespace {

// Ways to compute the same sums: the truth and three yardsticks.
enum class Way { kDouble, kPlain, kPlainAgain, kMatrixUnit };
constexpr Way kWays[] = {Way::kDouble, Way::kPlain, Way::kPlainAgain, Way::kMatrixUnit};

float bf16(float x) {
  return static_cast<float>(BFloat16(x));
}

// Everything of a problem as floats, [B, heads, T, D] each.
struct Arrays {
  Arrays(const DeviceProblem& problem, const ForwardOutputs* forward)
      : c(problem.inputs.problem),
        q(floats(problem.inputs.q.values())),
        k(floats(problem.inputs.k.values())),
        v(floats(problem.inputs.v.values())),
        last(problem.inputs.last),
        lengths(problem.inputs.lengths),
        scale(problem.inputs.scale) {
    if (!forward) return;
    dout = floats(problem.inputs.dout.values());
    out = floats(forward->out);
    lse = floats(forward->lse);
  }
  static std::vector<float> floats(const std::vector<double>& values) {
    return std::vector<float>(values.begin(), values.end());
  }
  int length(int64_t b) const { return lengths.empty() ? c.tokens : lengths[b]; }
  int group() const { return c.q_heads / c.kv_heads; }

  AttentionCase c;
  std::vector<float> q, k, v, dout, out, lse;
  std::vector<int32_t> last, lengths;
  float scale;
};

template <Way kWay>
struct Arithmetic {
  using Real = std::conditional_t<kWay == Way::kDouble, double, float>;

  static Real dot(const float* a, const float* b, int n) {
    if constexpr (kWay == Way::kMatrixUnit) return matrix_unit_dot(a, b, n);
    Real sum = 0;
    for (int i = 0; i < n; ++i) {
      const int c = kWay == Way::kPlainAgain ? n - 1 - i : i;
      sum += Real(a[c]) * Real(b[c]);
    }
    return sum;
  }
  static Real exp(Real x) {
    if constexpr (kWay == Way::kMatrixUnit) return std::exp2(x * 1.4426950408889634f);
    return std::exp(x);
  }
  // A factor of a matrix product.
  static Real operand(Real x) {
    if constexpr (kWay == Way::kMatrixUnit) return bf16(x);
    return x;
  }
  static void add(Real* to, Real factor, const float* from, int n) {
    for (int c = 0; c < n; ++c) to[c] += factor * Real(from[c]);
  }

  static void forward_row(const Arrays& a, int64_t head, int64_t i, double* out, double* lse) {
    const int d = a.c.head_dim;
    const int64_t b = head / a.c.q_heads, kv = head % a.c.q_heads / a.group();
    const int64_t kv_row = (b * a.c.kv_heads + kv) * a.c.tokens;
    Real largest = -std::numeric_limits<Real>::infinity(), sum = 0;
    std::vector<Real> score(i + 1), mean(d, 0);
    const float* q = &a.q[(head * a.c.tokens + i) * d];
    const bool used = i < a.length(b);
    for (int64_t j = 0; used && j <= i; ++j) {
      if (!visible(i, j, a.last[kv_row + j])) continue;
      score[j] = Real(a.scale) * dot(q, &a.k[(kv_row + j) * d], d);
      largest = std::max(largest, score[j]);
    }
    for (int64_t j = 0; used && j <= i; ++j) {
      if (!visible(i, j, a.last[kv_row + j])) continue;
      const Real probability = exp(score[j] - largest);
      sum += probability;
      add(mean.data(), operand(probability), &a.v[(kv_row + j) * d], d);
    }
    for (int c = 0; c < d; ++c) out[c] = bf16(static_cast<float>(sum > 0 ? mean[c] / sum : 0));
    *lse = static_cast<float>(sum > 0 ? largest + std::log(sum)
                                      : -std::numeric_limits<Real>::infinity());
  }

  static Real delta(const Arrays& a, int64_t q_row) {
    const int d = a.c.head_dim;
    Real sum = 0;
    for (int c = 0; c < d; ++c) sum += Real(a.dout[q_row * d + c]) * Real(a.out[q_row * d + c]);
    return sum;
  }

  static void dq_row(const Arrays& a, int64_t head, int64_t i, double* dq) {
    const int d = a.c.head_dim;
    const int64_t b = head / a.c.q_heads, kv = head % a.c.q_heads / a.group();
    const int64_t kv_row = (b * a.c.kv_heads + kv) * a.c.tokens, q_row = head * a.c.tokens + i;
    std::vector<Real> sum(d, 0);
    if (i < a.length(b) && std::isfinite(a.lse[q_row])) {
      const Real less = delta(a, q_row);
      for (int64_t j = 0; j <= i; ++j) {
        if (!visible(i, j, a.last[kv_row + j])) continue;
        const Real s = Real(a.scale) * dot(&a.q[q_row * d], &a.k[(kv_row + j) * d], d);
        const Real dp = dot(&a.dout[q_row * d], &a.v[(kv_row + j) * d], d) - less;
        add(sum.data(), operand(exp(s - Real(a.lse[q_row])) * dp), &a.k[(kv_row + j) * d], d);
      }
    }
    for (int c = 0; c < d; ++c) dq[c] = bf16(static_cast<float>(Real(a.scale) * sum[c]));
  }

  // Of key j: gradients, and sums up to each of `count` horizons, `plane` apart.
  static void key_row(const Arrays& a, const DeviceProblem& problem, int64_t kv_head, int64_t j,
                      double* dk, double* dv, double* mass, double* sums, int64_t sums_stride) {
    const int d = a.c.head_dim, count = problem.options.horizon_count;
    const int64_t b = kv_head / a.c.kv_heads, kv = kv_head % a.c.kv_heads;
    const int64_t key = kv_head * a.c.tokens + j;
    const int64_t plane = int64_t{a.c.batch} * a.c.kv_heads * a.c.tokens;
    std::vector<Real> sum_k(d, 0), sum_v(d, 0), sum(count, 0);
    Real received = 0;
    const int length = a.length(b);
    for (int g = 0; g < a.group() && j < length; ++g) {
      const int64_t head = b * a.c.q_heads + kv * a.group() + g;
      for (int64_t i = j; i < length; ++i) {
        const int64_t q_row = head * a.c.tokens + i;
        if (!std::isfinite(a.lse[q_row])) continue;
        const bool seen = visible(i, j, a.last[key]);
        if (!seen && count == 0) continue;
        const Real s = Real(a.scale) * dot(&a.q[q_row * d], &a.k[key * d], d);
        const Real dp = dot(&a.dout[q_row * d], &a.v[key * d], d) - delta(a, q_row);
        const Real factor = exp(s - Real(a.lse[q_row]));
        if (seen) {
          received += factor;
          add(sum_v.data(), operand(factor), &a.dout[q_row * d], d);
          add(sum_k.data(), operand(factor * dp), &a.q[q_row * d], d);
        }
        const Real gain = (problem.options.limit_factor ? std::min<Real>(factor, 1) : factor) * dp;
        for (int h = 0; h < count; ++h) {
          if (i <= problem.horizons[h * plane + key]) sum[h] += gain;
        }
      }
    }
    for (int c = 0; c < d; ++c) {
      dk[c] = bf16(static_cast<float>(Real(a.scale) * sum_k[c]));
      dv[c] = bf16(static_cast<float>(sum_v[c]));
    }
    *mass = static_cast<float>(received);
    for (int h = 0; h < count; ++h) sums[h * sums_stride] = static_cast<float>(sum[h]);
  }
};

// f<way>(where the results go) for each way.
template <class F>
void in_every_way(F&& f) {
  f.template operator()<Way::kDouble>(0);
  f.template operator()<Way::kPlain>(1);
  f.template operator()<Way::kPlainAgain>(2);
  f.template operator()<Way::kMatrixUnit>(3);
}

Expected empty(const char* name, DType dtype, int heads, int64_t rows, int columns, int64_t count) {
  Expected e{name, dtype, heads, static_cast<int>(rows), columns, {}, {}};
  e.truth.resize(count * columns);
  e.plain.assign(std::size(kWays) - 1, e.truth);
  return e;
}

double* place(Expected& e, int way, int64_t row) {
  return (way == 0 ? e.truth : e.plain[way - 1]).data() + row * e.columns;
}

}  // namespace

std::vector<Expected> sampled_forward(const DeviceProblem& problem,
                                      const std::vector<int32_t>& positions,
                                      const ParallelFor& parallel) {
  const Arrays a(problem, nullptr);
  const int64_t n = static_cast<int64_t>(positions.size());
  const int64_t rows = int64_t{a.c.batch} * a.c.q_heads * n;
  std::vector<Expected> all = {
      empty("out", a.c.dtype, a.c.q_heads, n, a.c.head_dim, rows),
      empty("lse", DType::kFloat32, a.c.q_heads, n, 1, rows),
  };
  parallel(rows, [&](int64_t row, int) {
    in_every_way([&]<Way kWay>(int way) {
      Arithmetic<kWay>::forward_row(a, row / n, positions[row % n], place(all[0], way, row),
                                    place(all[1], way, row));
    });
  });
  return all;
}

std::vector<Expected> sampled_backward(const DeviceProblem& problem, const ForwardOutputs& forward,
                                       const std::vector<int32_t>& positions,
                                       const ParallelFor& parallel) {
  const Arrays a(problem, &forward);
  const int64_t n = static_cast<int64_t>(positions.size());
  const int64_t q_rows = int64_t{a.c.batch} * a.c.q_heads * n;
  const int64_t k_rows = int64_t{a.c.batch} * a.c.kv_heads * n;
  const int count = problem.options.horizon_count;
  std::vector<Expected> all = {
      empty("mass", DType::kFloat32, a.c.kv_heads, n, 1, k_rows),
      empty("dq", a.c.dtype, a.c.q_heads, n, a.c.head_dim, q_rows),
      empty("dk", a.c.dtype, a.c.kv_heads, n, a.c.head_dim, k_rows),
      empty("dv", a.c.dtype, a.c.kv_heads, n, a.c.head_dim, k_rows),
      empty("role_sums", DType::kFloat32, a.c.kv_heads, n, 1, count * k_rows),
  };
  parallel(q_rows + k_rows, [&](int64_t task, int) {
    in_every_way([&]<Way kWay>(int way) {
      if (task < q_rows) {
        Arithmetic<kWay>::dq_row(a, task / n, positions[task % n], place(all[1], way, task));
        return;
      }
      const int64_t row = task - q_rows;
      Arithmetic<kWay>::key_row(a, problem, row / n, positions[row % n], place(all[2], way, row),
                                place(all[3], way, row), place(all[0], way, row),
                                place(all[4], way, row), k_rows);
    });
  });
  return all;
}

std::vector<double> pick(const std::vector<double>& values, int tokens, int columns,
                         const std::vector<int32_t>& positions) {
  std::vector<double> picked;
  const int64_t blocks = static_cast<int64_t>(values.size()) / (int64_t{tokens} * columns);
  for (int64_t block = 0; block < blocks; ++block) {
    for (const int32_t t : positions) {
      const auto from = values.begin() + (block * tokens + t) * columns;
      picked.insert(picked.end(), from, from + columns);
    }
  }
  return picked;
}

}  // namespace natslm::test
