// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/fused_layers.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "natslm/base/error.h"

namespace natslm::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AddNorm : public torch::autograd::Function<AddNorm> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x_in,
                               const std::optional<Tensor>& branch, const Tensor& weight,
                               double epsilon, bool centered, int64_t dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const int64_t width = x_in.size(-1);
    const auto rows = [&](const Tensor& x) { return x.contiguous().view({-1, width}); };
    const Tensor x = rows(x_in);
    const Normed normed = norm(x, branch ? rows(*branch) : Tensor(), weight, {epsilon, centered},
                               static_cast<at::ScalarType>(dtype));
    // Of a norm without a branch the sum is x itself: an alias, since inputs are no outputs.
    const Tensor sum = normed.sum.view(x_in.sizes());
    ctx->save_for_backward({sum, normed.mean, normed.rstd, weight});
    ctx->saved_data["epsilon"] = epsilon;
    ctx->saved_data["centered"] = centered;
    ctx->saved_data["has_branch"] = branch.has_value();
    ctx->set_materialize_grads(false);
    return {sum, normed.y.view(x_in.sizes())};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool has_branch = ctx->saved_data["has_branch"].toBool();
    const Tensor &dsum = gradients[0], &dy = gradients[1];
    if (!dy.defined()) return {dsum, has_branch ? dsum : Tensor(), {}, {}, {}, {}};
    const variable_list saved = ctx->get_saved_variables();
    const int64_t width = saved[0].size(-1);
    const auto rows = [&](const Tensor& x) { return x.contiguous().view({-1, width}); };
    // Not of y itself: only its type is asked for.
    const Normed forward = {
        .sum = rows(saved[0]), .y = rows(dy), .mean = saved[1], .rstd = saved[2]};
    const Tensor dx = at::empty_like(forward.sum);
    const Tensor dbranch =
        norm_backward(forward, saved[3],
                      {ctx->saved_data["epsilon"].toDouble(), ctx->saved_data["centered"].toBool()},
                      forward.y, dsum.defined() ? rows(dsum) : Tensor(), dx, {}, false);
    return {dx.view(saved[0].sizes()),
            has_branch ? dbranch.view(saved[0].sizes()) : Tensor(),
            {},
            {},
            {},
            {}};
  }
};

class TurnHeads : public torch::autograd::Function<TurnHeads> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& fused, int64_t q_heads,
                               int64_t kv_heads, const Tensor& cos, const Tensor& sin) {
    const at::AutoDispatchBelowADInplaceOrView below;
    rotate_heads_(fused, q_heads + kv_heads, cos, sin);
    ctx->save_for_backward({cos, sin});
    const int64_t batch = fused.size(0), tokens = fused.size(1), d = 2 * cos.size(1);
    const auto part = [&](int64_t first, int64_t heads) {
      return fused.narrow(2, first * d, heads * d).view({batch, tokens, heads, d}).transpose(1, 2);
    };
    return {part(0, q_heads), part(q_heads, kv_heads), part(q_heads + kv_heads, kv_heads)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& d) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list tables = ctx->get_saved_variables();
    const int64_t columns = (d[0].size(1) + 2 * d[1].size(1)) * d[0].size(3);
    return {
        rotate_heads_backward(d[0], d[1], d[2], {}, columns, tables[0], tables[1]), {}, {}, {}, {}};
  }
};

class GatedActivation : public torch::autograd::Function<GatedActivation> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x_in, int64_t activation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor x = x_in.contiguous();
    ctx->save_for_backward({x});
    ctx->saved_data["activation"] = activation;
    return gated(x, static_cast<kernels::GateActivation>(activation));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto activation =
        static_cast<kernels::GateActivation>(ctx->saved_data["activation"].toInt());
    return {gated_backward(ctx->get_saved_variables()[0], gradients[0].contiguous(), activation),
            {}};
  }
};

}  // namespace

SumAndNorm add_norm(const Tensor& x, const Tensor& branch, const Tensor& weight,
                    const NormOptions& options, at::ScalarType dtype) {
  NATSLM_CHECK(!weight.requires_grad(), "add_norm: the weight must be frozen");
  const variable_list r =
      AddNorm::apply(x, branch.defined() ? std::optional(branch) : std::nullopt, weight,
                     options.epsilon, options.centered, static_cast<int64_t>(dtype));
  return {.sum = r[0], .y = r[1]};
}

TurnedHeads turn_heads(const Tensor& fused, int64_t q_heads, int64_t kv_heads, const Tensor& cos,
                       const Tensor& sin) {
  NATSLM_CHECK(fused.size(2) == (q_heads + 2 * kv_heads) * 2 * cos.size(1),
               "turn_heads: ", fused.size(2), " columns are not those of ", q_heads, " + 2 * ",
               kv_heads, " heads of ", 2 * cos.size(1));
  const variable_list r = TurnHeads::apply(fused, q_heads, kv_heads, cos, sin);
  return {.q = r[0], .k = r[1], .v = r[2]};
}

Tensor gated_activation(const Tensor& x, kernels::GateActivation activation) {
  return GatedActivation::apply(x, static_cast<int64_t>(activation));
}

}  // namespace natslm::ops
