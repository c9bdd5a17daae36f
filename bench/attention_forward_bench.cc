// Attention forward against LibTorch's dense causal attention (the faster of expanded heads and
// enable_gqa), both interleaved in one loop.
//
//   attention_forward_bench --benchmark_counters_tabular=true
//
// speedup: dense / ours, minima of all rounds; cpu_speedup: the same of processor time, to be read
// with OMP_NUM_THREADS=1 on a busy machine. visible: share of the causal pairs. GFLOP/s: of the
// visible pairs, so never above what the dense kernel would need for them.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <benchmark/benchmark.h>
#include <c10/core/InferenceMode.h>

#include "bench/attention_bench.h"
#include "natslm/kernels/attention_forward.h"

namespace natslm::bench {
namespace {

void forward(benchmark::State& state) {
  const c10::InferenceMode no_gradients;
  const Shape shape = shape_of(state);
  const RandomRoles roles = random_roles(shape, state.range(5) / 100.0, state.range(6) / 100.0, 64);
  const auto type = state.range(7) == 16 ? at::kBFloat16 : at::kFloat;
  const at::Tensor q = random_tensor(shape, shape.q_heads, type, 1),
                   k = random_tensor(shape, shape.kv_heads, type, 2),
                   v = random_tensor(shape, shape.kv_heads, type, 3);
  const int group = shape.q_heads / shape.kv_heads;
  const at::Tensor wide_k = k.repeat_interleave(group, 1), wide_v = v.repeat_interleave(group, 1);
  at::Tensor out = q.clone();
  std::vector<float> lse(shape.queries());

  auto p = describe<kernels::AttentionForward>(shape, q, k, v, roles.last);
  p.out = out.mutable_data_ptr();
  p.out_stride = strides(out);
  p.lse = lse.data();

  Race race;
  for (auto _ : state) {
    state.SetIterationTime(race.time(0, [&] { kernels::cpu::run(p); }));
    race.time(1, [&] { at::scaled_dot_product_attention(q, wide_k, wide_v, {}, 0.0, true); });
    if (group > 1) {
      race.time(
          2, [&] { at::scaled_dot_product_attention(q, k, v, {}, 0.0, true, std::nullopt, true); });
    }
  }
  const double ours = race.best(0);
  const double dense = group > 1 ? std::min(race.best(1), race.best(2)) : race.best(1);
  const double pairs = static_cast<double>(visible_pairs(shape, roles.last));
  state.counters["ours_ms"] = ours * 1e3;
  state.counters["dense_ms"] = dense * 1e3;
  state.counters["speedup"] = dense / ours;
  state.counters["cpu_speedup"] =
      (group > 1 ? std::min(race.best_cpu(1), race.best_cpu(2)) : race.best_cpu(1)) /
      race.best_cpu(0);
  state.counters["visible"] = pairs / static_cast<double>(causal_pairs(shape));
  state.counters["GFLOP/s"] = 4.0 * shape.head_dim * pairs / ours * 1e-9;
  state.counters["dense_GFLOP/s"] =
      4.0 * shape.head_dim * static_cast<double>(causal_pairs(shape)) / dense * 1e-9;
}

BENCHMARK(forward)
    ->ArgNames({"B", "Hq", "Hkv", "T", "D", "global%", "local%", "bits"})
    ->Args({1, 9, 3, 16384, 64, 11, 3, 32})
    ->Args({1, 9, 3, 16384, 64, 11, 3, 16})
    ->Args({1, 9, 3, 16384, 64, 100, 0, 32})
    ->Args({1, 9, 3, 2048, 64, 11, 3, 32})
    ->Args({1, 9, 3, 2048, 64, 100, 0, 32})
    ->Args({1, 8, 2, 4096, 128, 11, 3, 32})
    ->Args({1, 8, 2, 4096, 128, 100, 0, 32})
    ->Args({16, 2, 2, 512, 64, 11, 3, 32})
    ->Args({16, 2, 2, 512, 64, 100, 0, 32})
    ->UseManualTime()
    ->Iterations(5)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace natslm::bench

BENCHMARK_MAIN();
