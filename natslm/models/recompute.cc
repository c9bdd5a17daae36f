// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/recompute.h"

#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace natslm::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a context can carry: IValue takes no std::function.
struct Held : torch::CustomClassHolder {
  explicit Held(LayerFunction of) : layer(std::move(of)) {}
  LayerFunction layer;
};

class Recomputed : public torch::autograd::Function<Recomputed> {
 public:
  // {output, price, shares}; the last two only if the layer gave roles.
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const c10::intrusive_ptr<Held>& held) {
    RoleTally tally;
    variable_list results;
    {
      const c10::NoGradGuard no_grad;
      results.push_back(held->layer(x, tally));
    }
    if (!tally.prices().empty()) {
      results.push_back(tally.prices().front());
      results.push_back(tally.shares().front());
      ctx->mark_non_differentiable({results.back()});
    }
    ctx->save_for_backward({x});
    ctx->saved_data["held"] = c10::IValue::make_capsule(held);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_(true);
    const auto held = c10::static_intrusive_pointer_cast<Held>(ctx->saved_data["held"].toCapsule());
    RoleTally tally;
    variable_list roots, with;
    {
      const c10::AutoGradMode gradient(true);
      roots.push_back(held->layer(x, tally));
    }
    with.push_back(gradients[0]);
    if (!tally.prices().empty() && gradients[1].defined() &&
        tally.prices().front().requires_grad()) {
      roots.push_back(tally.prices().front());
      with.push_back(gradients[1]);
    }
    torch::autograd::backward(roots, with);
    return {x.grad(), Tensor()};
  }
};

}  // namespace

Tensor recomputed(const Tensor& x, RoleTally& tally, LayerFunction layer) {
  // The first layer's input needs no gradient, but without one nothing would come back to here.
  const Tensor in = x.requires_grad() ? x : x.detach().requires_grad_(true);
  const variable_list results = Recomputed::apply(in, c10::make_intrusive<Held>(std::move(layer)));
  if (results.size() > 1) tally.add(results[1], results[2]);
  return results[0];
}

}  // namespace natslm::models
