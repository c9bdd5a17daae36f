// Attention forward + backward with role sums against LibTorch's dense causal attention through
// autograd (heads expanded beforehand, so that it does no work for the group), interleaved in one
// loop.
//
//   attention_backward_bench --benchmark_counters_tabular=true
//
// ratio: ours / dense, forward + backward, minima of all rounds; cpu_ratio: the same of processor
// time, to be read with OMP_NUM_THREADS=1 on a busy machine. visible: share of the causal
// pairs. GFLOP/s: of the backward pass: three products over the visible pairs, and two over the
// visible ones or, with horizons, over all causal ones.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <benchmark/benchmark.h>

#include "bench/attention_bench.h"
#include "natslm/kernels/attention_backward.h"

namespace natslm::bench {
namespace {

void forward_and_backward(benchmark::State& state) {
  const Shape shape = shape_of(state);
  const RandomRoles roles =
      random_roles(shape, state.range(5) / 100.0, state.range(6) / 100.0, shape.tokens / 32);
  const int group = shape.q_heads / shape.kv_heads;
  const auto tensor = [&](int heads, uint64_t seed) {
    return random_tensor(shape, heads, at::kFloat, seed);
  };
  at::Tensor q = tensor(shape.q_heads, 1), k = tensor(shape.kv_heads, 2),
             v = tensor(shape.kv_heads, 3), dout = tensor(shape.q_heads, 4);
  at::Tensor out = q.clone(), dq = q.clone(), dk = k.clone(), dv = v.clone();
  std::vector<float> lse(shape.queries());
  std::vector<float> role_sums(3 * shape.keys());

  auto f = describe<kernels::AttentionForward>(shape, q, k, v, roles.last);
  f.out = out.mutable_data_ptr();
  f.out_stride = strides(out);
  f.lse = lse.data();
  auto b = describe<kernels::AttentionBackward>(shape, q, k, v, roles.last);
  b.out = f.out;
  b.out_stride = f.out_stride;
  b.lse = f.lse;
  b.dout = dout.const_data_ptr();
  b.dout_stride = b.dq_stride = strides(q);
  b.dk_stride = b.dv_stride = strides(k);
  b.dq = dq.mutable_data_ptr();
  b.dk = dk.mutable_data_ptr();
  b.dv = dv.mutable_data_ptr();
  b.horizon_count = static_cast<int>(state.range(7));
  b.horizons = roles.horizons.data();
  b.role_sums = role_sums.data();

  at::Tensor dense_q = q.clone().set_requires_grad(true);
  at::Tensor dense_k = k.repeat_interleave(group, 1).set_requires_grad(true);
  at::Tensor dense_v = v.repeat_interleave(group, 1).set_requires_grad(true);
  Race race;
  for (auto _ : state) {
    const double forward = race.time(0, [&] { kernels::cpu::run(f); });
    state.SetIterationTime(forward + race.time(1, [&] { kernels::cpu::run(b); }));
    at::Tensor dense_out;
    race.time(2, [&] {
      dense_out = at::scaled_dot_product_attention(dense_q, dense_k, dense_v, {}, 0.0, true);
    });
    race.time(3, [&] { dense_out.backward(dout); });
    for (at::Tensor* x : {&dense_q, &dense_k, &dense_v}) x->mutable_grad().reset();
  }
  const double ours = race.best(0) + race.best(1), dense = race.best(2) + race.best(3);
  const auto visible = static_cast<double>(visible_pairs(shape, roles.last));
  const auto causal = static_cast<double>(causal_pairs(shape));
  const double scored = b.horizon_count > 0 ? causal : visible;
  state.counters["forward_ms"] = race.best(0) * 1e3;
  state.counters["backward_ms"] = race.best(1) * 1e3;
  state.counters["dense_fwd_ms"] = race.best(2) * 1e3;
  state.counters["dense_bwd_ms"] = race.best(3) * 1e3;
  state.counters["ratio"] = ours / dense;
  state.counters["cpu_ratio"] =
      (race.best_cpu(0) + race.best_cpu(1)) / (race.best_cpu(2) + race.best_cpu(3));
  state.counters["visible"] = visible / causal;
  state.counters["GFLOP/s"] =
      2.0 * shape.head_dim * (3 * visible + 2 * scored) / race.best(1) * 1e-9;
}

BENCHMARK(forward_and_backward)
    ->ArgNames({"B", "Hq", "Hkv", "T", "D", "global%", "local%", "horizons"})
    ->Args({1, 4, 4, 2048, 64, 15, 3, 3})
    ->Args({1, 9, 3, 2048, 64, 15, 3, 3})
    ->Args({1, 9, 3, 2048, 64, 15, 3, 0})
    ->Args({1, 9, 3, 2048, 64, 100, 0, 0})
    ->Args({1, 9, 3, 8192, 64, 15, 3, 3})
    ->Args({16, 2, 2, 512, 64, 15, 3, 3})
    ->Args({16, 2, 2, 512, 64, 100, 0, 0})
    ->UseManualTime()
    ->Iterations(7)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace natslm::bench

BENCHMARK_MAIN();
