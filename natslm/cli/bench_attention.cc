// nats-lm bench attention: the attention operator against LibTorch's dense one.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "natslm/cli/bench.h"
#include "natslm/ops/attention.h"

namespace natslm::cli {

namespace {

struct Options {
  Workload work;
  bool backward = false;
};

// Forward multiplies twice (scores, outputs), backward five times; 2 * D operations each.
constexpr int kForwardProducts = 2;
constexpr int kBackwardProducts = 5;

void run(const Options& o, Context& context) {
  check(o.work);
  const Workload& w = o.work;
  const auto normal = [&](int32_t heads) {
    return at::randn({w.batch, heads, w.tokens, w.head_dim}, scalar_type(w))
        .requires_grad_(o.backward);
  };
  const at::Tensor q = normal(w.heads), k = normal(w.kv_heads), v = normal(w.kv_heads);
  // Dense gets keys and values already repeated for the heads of a group: nothing is faster for it.
  const auto repeated = [&](const at::Tensor& x) {
    return x.detach()
        .repeat_interleave(w.heads / w.kv_heads, 1)
        .contiguous()
        .requires_grad_(o.backward);
  };
  const at::Tensor dense_k = repeated(k), dense_v = repeated(v);
  const at::Tensor dense_q = q.detach().clone().requires_grad_(o.backward);
  const RandomRoles roles = draw_roles(w, int64_t{w.batch} * w.kv_heads);
  const at::Tensor last = roles.last.view({w.batch, w.kv_heads, w.tokens});

  at::AutoGradMode gradients(o.backward);
  const at::Tensor grad = at::ones_like(q.detach());
  ops::RoleInputs role_inputs;
  if (o.backward) {
    role_inputs.horizons = roles.horizons.view({3, w.batch, w.kv_heads, w.tokens});
    role_inputs.onehot = at::randn({w.batch, w.kv_heads, w.tokens, 3}).requires_grad_(true);
  }
  const auto clear = [](std::initializer_list<at::Tensor> tensors) {
    for (const at::Tensor& tensor : tensors) tensor.mutable_grad() = at::Tensor();
  };
  const auto ours = [&] {
    const auto result = ops::attention(q, k, v, last, std::nullopt, std::nullopt,
                                       o.backward ? std::optional(role_inputs) : std::nullopt);
    if (!o.backward) return;
    result.out.backward(grad);
    clear({q, k, v, role_inputs.onehot});
  };
  const auto dense = [&] {
    const at::Tensor out =
        at::scaled_dot_product_attention(dense_q, dense_k, dense_v, {}, 0.0, true);
    if (!o.backward) return;
    out.backward(grad);
    clear({dense_q, dense_k, dense_v});
  };
  BenchResult result;
  result.baseline = "dense";
  result.times = compare(ours, dense, w.repeat);
  const double group = double(w.heads) / w.kv_heads;
  result.live_pairs = double(roles.live_pairs) * group;
  result.causal_pairs = 0.5 * w.tokens * (w.tokens + 1.0) * w.batch * w.heads;
  result.kv_end = roles.kv_end;
  result.flop_per_pair =
      2.0 * w.head_dim * (kForwardProducts + (o.backward ? kBackwardProducts : 0));
  report(context, result, {{"backward", o.backward}});
}

}  // namespace

void add_bench_attention(CLI::App& bench, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(bench, "attention",
                                  "attention over whole sequences against dense (LibTorch's SDPA)",
                                  [o, &context] { run(*o, context); });
  add_workload_options(command, o->work);
  command.add_flag("--backward", o->backward, "time forward and backward with the role sums");
}

}  // namespace natslm::cli
