// Problems for the attention benchmarks: random numbers, roles at random, and the work they need.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <random>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/ops/parallel.h"

namespace natslm::bench {

struct Shape {
  int batch, q_heads, kv_heads, tokens, head_dim;
  int64_t queries() const { return int64_t{batch} * q_heads * tokens; }
  int64_t keys() const { return int64_t{batch} * kv_heads * tokens; }
};

// The first arguments of a benchmark: B, Hq, Hkv, T, D.
inline Shape shape_of(const benchmark::State& state) {
  return {static_cast<int>(state.range(0)), static_cast<int>(state.range(1)),
          static_cast<int>(state.range(2)), static_cast<int>(state.range(3)),
          static_cast<int>(state.range(4))};
}

inline std::vector<float> random_numbers(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = normal(random);
  return numbers;
}

// [B, heads, T, D]
inline at::Tensor random_tensor(const Shape& shape, int heads, at::ScalarType type, uint64_t seed) {
  const int64_t count = int64_t{shape.batch} * heads * shape.tokens * shape.head_dim;
  std::vector<float> numbers = random_numbers(count, seed);
  return at::from_blob(numbers.data(), {shape.batch, heads, shape.tokens, shape.head_dim})
      .to(type, /*non_blocking=*/false, /*copy=*/true);
}

inline kernels::Strides strides(const at::Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

// What forward and backward share.
template <class Params>
Params describe(const Shape& shape, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const std::vector<int32_t>& last) {
  Params p;
  p.batch = shape.batch;
  p.q_heads = shape.q_heads;
  p.kv_heads = shape.kv_heads;
  p.tokens = shape.tokens;
  p.head_dim = shape.head_dim;
  p.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  p.dtype = q.scalar_type() == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_stride = strides(q);
  p.k_stride = strides(k);
  p.v_stride = strides(v);
  p.last = last.data();
  p.parallel = ops::torch_threads();
  return p;
}

// Lifetimes of [B, Hkv, T] keys: Global with probability global_share, Local with local_share, the
// rest in a window; and what each of the three roles would have given, [3, B, Hkv, T].
struct RandomRoles {
  std::vector<int32_t> last, horizons;
};
inline RandomRoles random_roles(const Shape& shape, double global_share, double local_share,
                                int window) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform;
  RandomRoles roles{std::vector<int32_t>(shape.keys()), std::vector<int32_t>(3 * shape.keys())};
  for (int64_t head = 0; head < int64_t{shape.batch} * shape.kv_heads; ++head) {
    int32_t next = kForever;
    for (int j = shape.tokens - 1; j >= 0; --j) {
      const int64_t at = head * shape.tokens + j;
      const double u = uniform(random);
      const bool global = j == 0 || u < global_share;
      const bool local = !global && u < global_share + local_share;
      roles.horizons[at] = kForever;
      roles.horizons[shape.keys() + at] = next;
      roles.horizons[2 * shape.keys() + at] = j + window;
      roles.last[at] = global ? kForever : local ? next : j + window;
      if (global) next = j;
    }
  }
  return roles;
}

// Pairs of a query head and a key that the lifetimes let through, over the whole batch.
inline int64_t visible_pairs(const Shape& shape, const std::vector<int32_t>& last) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < shape.keys(); ++i) {
    pairs += queries_served(static_cast<int32_t>(i % shape.tokens), last[i], shape.tokens);
  }
  return pairs * (shape.q_heads / shape.kv_heads);
}

// Times of several arms that take turns, so that a busy machine hits all of them alike: the best
// wall-clock time of each, and the best processor time, which neighbours on the machine disturb
// less.
class Race {
 public:
  template <class Body>
  double time(size_t arm, Body&& body) {
    const auto begin = std::chrono::steady_clock::now();
    const std::clock_t cpu_begin = std::clock();
    body();
    const double cpu = static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC;
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
    if (best_.size() <= arm) best_.resize(arm + 1);
    best_[arm].wall = std::min(best_[arm].wall, wall.count());
    best_[arm].cpu = std::min(best_[arm].cpu, cpu);
    return wall.count();
  }
  double best(size_t arm) const { return best_[arm].wall; }
  double best_cpu(size_t arm) const { return best_[arm].cpu; }

 private:
  struct Times {
    double wall = 1e30, cpu = 1e30;
  };
  std::vector<Times> best_;
};

inline int64_t causal_pairs(const Shape& shape) {
  return int64_t{shape.batch} * shape.q_heads * shape.tokens * (shape.tokens + 1) / 2;
}

}  // namespace natslm::bench
