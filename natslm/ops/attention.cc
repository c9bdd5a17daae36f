// Registration and gradient of natslm::attention, and its call on the CPU; attention_cuda.cc has
// the GPU's. Nothing here computes attention: see natslm/kernels. SPDX-License-Identifier:
// Apache-2.0
#include "natslm/ops/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/ops/attention_calls.h"
#include "natslm/ops/library_attention.h"
#include "natslm/ops/parallel.h"

namespace natslm::ops {
namespace {

using at::Tensor;

constexpr auto kForwardSchema =
    "attention(Tensor q, Tensor k, Tensor v, Tensor last, Tensor? lengths, float scale, "
    "bool want_mass, Tensor? order, Tensor? ends, int reach, float density, int path) -> "
    "(Tensor out, Tensor lse, Tensor mass)";
constexpr auto kBackwardSchema =
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor last, Tensor? lengths, float scale, Tensor? horizons, Tensor? role_lse, "
    "bool limit_factor, Tensor? order, Tensor? ends, int reach, float density, int path) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor role_sums)";

// The kernels take any strides but the last.
Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

template <class Params>
void run_cpu(Params& p) {
  p.parallel = torch_threads();
  const std::string_view reason = kernels::cpu::why_not(p);
  TORCH_CHECK(reason.empty(), "attention: ", std::string(reason));
  kernels::cpu::run(p);
}

// The order of the keys and the path mean nothing to the CPU kernels.
std::tuple<Tensor, Tensor, Tensor> attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                                 const Tensor& v_in, const Tensor& last_in,
                                                 const OptionalTensor& lengths_in, double scale,
                                                 bool want_mass, const OptionalTensor&,
                                                 const OptionalTensor&, int64_t, double, int64_t) {
  check_attention(q_in, k_in, v_in, last_in, lengths_in, scale);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
               v = with_contiguous_rows(v_in), last = last_in.contiguous(),
               lengths = contiguous_or_none(lengths_in);
  ForwardCall call(q, k, v, last, lengths, scale, want_mass);
  run_cpu(call.params);
  return {call.out, call.lse, call.mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const Tensor& last_in,
    const OptionalTensor& lengths_in, double scale, const OptionalTensor& horizons_in,
    const OptionalTensor& role_lse_in, bool limit_factor, const OptionalTensor&,
    const OptionalTensor&, int64_t, double, int64_t) {
  check_attention(q_in, k_in, v_in, last_in, lengths_in, scale);
  check_attention_backward(dout_in, q_in, k_in, horizons_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
               v = with_contiguous_rows(v_in), out = with_contiguous_rows(out_in),
               dout = with_contiguous_rows(dout_in), last = last_in.contiguous(),
               lengths = contiguous_or_none(lengths_in), lse = lse_in.contiguous(),
               horizons = contiguous_or_none(horizons_in),
               role_lse = contiguous_or_none(role_lse_in);
  BackwardCall call(dout, q, k, v, out, lse, last, lengths, scale, horizons, role_lse,
                    limit_factor);
  run_cpu(call.params);
  return {call.dq, call.dk, call.dv, call.role_sums};
}

// Through the dispatcher, so that the tensors' device chooses the backend.
template <class... Args>
auto call_forward(const Args&... args) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("natslm::attention", "").typed<AttentionOp>();
  return op.call(args...);
}

template <class... Args>
auto call_backward(const Args&... args) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("natslm::attention_backward", "")
                             .typed<AttentionBackwardOp>();
  return op.call(args...);
}

// [4, B, Hkv, T]: the three horizons, and for each key the Global after the one that ends it.
Tensor with_second_global(const Tensor& horizons) {
  const Tensor local = horizons[1];
  const int64_t tokens = local.size(-1);
  const Tensor ended = local.lt(tokens);
  const Tensor second =
      at::where(ended, local.gather(-1, local.clamp(0, tokens - 1).to(at::kLong)), local);
  Tensor all = at::empty({4, local.size(0), local.size(1), tokens}, horizons.options());
  all.narrow(0, 0, 3).copy_(horizons);
  all[3].copy_(second);
  return all;
}

// u_G of every Global that ends a Local segment, reduced by what the segment's Locals would have
// given from it until the next Global. sums [4, B, Hkv, T] -> [3, B, Hkv, T].
Tensor apply_end_term(const Tensor& sums, const Tensor& onehot, const Tensor& horizons) {
  const Tensor local = horizons[1];
  const int64_t tokens = local.size(-1);
  const Tensor charged = onehot.select(-1, 1).gt(0.5).logical_and(local.lt(tokens));
  const Tensor lost = at::where(charged, sums[3] - sums[1], at::zeros_like(sums[3]));
  const Tensor result = sums.narrow(0, 0, 3).clone();
  result[0].scatter_add_(-1, local.clamp(0, tokens - 1).to(at::kLong), lost.neg());
  return result;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptionalTensor& onehot, const Tensor& last,
                               const OptionalTensor& lengths, const OptionalTensor& horizons,
                               double scale, bool limit_factor, bool causal_normalizer,
                               bool end_term, bool want_mass, const OptionalTensor& order,
                               const OptionalTensor& ends, int64_t reach, double density,
                               int64_t forward_path, int64_t backward_path) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, lse, mass] = call_forward(q, k, v, last, lengths, scale, want_mass, order, ends,
                                         reach, density, forward_path);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["limit_factor"] = limit_factor;
    ctx->saved_data["causal_normalizer"] = causal_normalizer;
    ctx->saved_data["end_term"] = end_term;
    ctx->saved_data["reach"] = reach;
    ctx->saved_data["density"] = density;
    ctx->saved_data["path"] = backward_path;
    ctx->save_for_backward({q, k, v, out, lse, last, lengths.value_or(Tensor()),
                            horizons.value_or(Tensor()), end_term ? *onehot : Tensor(),
                            order.value_or(Tensor()), ends.value_or(Tensor())});
    ctx->mark_non_differentiable({lse, mass});
    return {out, lse, mass};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4],
                 &last = saved[5], &horizons = saved[7], &onehot = saved[8];
    const auto optional = [](const Tensor& x) {
      return x.defined() ? OptionalTensor(x) : std::nullopt;
    };
    const OptionalTensor lengths = optional(saved[6]), order = optional(saved[9]),
                         ends = optional(saved[10]);
    const int64_t reach = ctx->saved_data["reach"].toInt();
    const double density = ctx->saved_data["density"].toDouble();
    const double scale = ctx->saved_data["scale"].toDouble();
    const bool limit_factor = ctx->saved_data["limit_factor"].toBool();
    const bool end_term = ctx->saved_data["end_term"].toBool();

    OptionalTensor role_horizons, role_lse;
    if (horizons.defined()) {
      role_horizons = end_term ? with_second_global(horizons) : horizons;
      if (ctx->saved_data["causal_normalizer"].toBool()) {
        // Every key alive: the order was made for other lifetimes.
        const OptionalTensor none;
        role_lse = std::get<1>(call_forward(q, k, v, at::full_like(last, kForever), lengths, scale,
                                            false, none, none, int64_t{0}, 1.0, int64_t{-1}));
      }
    }
    auto [dq, dk, dv, sums] =
        call_backward(grads[0], q, k, v, out, lse, last, lengths, scale, role_horizons, role_lse,
                      limit_factor, order, ends, reach, density, ctx->saved_data["path"].toInt());
    Tensor donehot;
    if (horizons.defined()) {
      if (end_term) sums = apply_end_term(sums, onehot, horizons);
      donehot = sums.permute({1, 2, 3, 0});
    }
    variable_list gradients = {dq, dk, dv, donehot};
    gradients.resize(18);  // one for each argument of forward
    return gradients;
  }
};

void check_roles(const RoleInputs& roles, const Tensor& last) {
  const int64_t count = roles.onehot.dim() == 4 ? roles.onehot.size(3) : 0;
  TORCH_CHECK(count > 0 && roles.onehot.sizes().slice(0, 3) == last.sizes(),
              "attention: onehot must be [B, Hkv, T, R], got ", roles.onehot.sizes(), " for last ",
              last.sizes());
  TORCH_CHECK(roles.onehot.scalar_type() == at::kFloat, "attention: onehot must be float32, got ",
              roles.onehot.scalar_type());
  check_integers(roles.horizons, "horizons", {count, last.size(0), last.size(1), last.size(2)},
                 last);
  TORCH_CHECK(!roles.end_term || count == 3,
              "attention: end_term needs the roles Global, Local, Sliding window; got ", count,
              " roles");
}

}  // namespace

AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& last_in,
                          const OptionalTensor& lengths, std::optional<double> scale,
                          const std::optional<RoleInputs>& roles, bool want_mass,
                          const AttentionHints& hints) {
  TORCH_CHECK(q.dim() == 4, "attention: q must be [B, Hq, T, D], got ", q.sizes());
  const double factor =
      scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(q.size(3), 1))));
  check_heads(q, k, v, lengths, factor);
  const bool only_out = !last_in.defined() && !roles && !want_mass;
  TORCH_CHECK(
      only_out || hints.forward_path != kernels::AttentionPath::kLibrary,
      "attention: LibTorch's dense kernels take no lifetimes and give no role sums or mass");
  if (only_out && library_serves(q, k, lengths, hints)) {
    return {library_attention(q, k, v, lengths, factor), Tensor(), Tensor()};
  }
  const Tensor last = last_in.defined() ? last_in
                                        : at::full({q.size(0), k.size(1), q.size(2)}, kForever,
                                                   q.options().dtype(at::kInt));
  check_attention(q, k, v, last, lengths, factor);
  if (roles) check_roles(*roles, last);
  const RoleInputs r = roles.value_or(RoleInputs{});
  const OptionalTensor onehot = roles ? OptionalTensor(r.onehot) : std::nullopt;
  const OptionalTensor horizons = roles ? OptionalTensor(r.horizons) : std::nullopt;
  const bool ordered = hints.order.defined();
  const OptionalTensor order = ordered ? OptionalTensor(hints.order) : std::nullopt;
  const OptionalTensor ends = ordered ? OptionalTensor(hints.ends) : std::nullopt;
  const auto number = [](const std::optional<kernels::AttentionPath>& path) {
    return path ? static_cast<int64_t>(*path) : int64_t{-1};
  };
  const variable_list results = AttentionFunction::apply(
      q, k, v, onehot, last, lengths, horizons, factor, r.limit_factor, r.causal_normalizer,
      r.end_term, want_mass, order, ends, int64_t{hints.reach}, hints.density,
      number(hints.forward_path), number(hints.backward_path));
  return {results[0], results[1], want_mass ? results[2] : Tensor()};
}

}  // namespace natslm::ops

TORCH_LIBRARY(natslm, m) {
  m.def(natslm::ops::kForwardSchema);
  m.def(natslm::ops::kBackwardSchema);
}

TORCH_LIBRARY_IMPL(natslm, CPU, m) {
  m.impl("attention", TORCH_FN(natslm::ops::attention_cpu));
  m.impl("attention_backward", TORCH_FN(natslm::ops::attention_backward_cpu));
}

TORCH_LIBRARY_IMPL(natslm, CUDA, m) {
  m.impl("attention", TORCH_FN(natslm::ops::attention_cuda));
  m.impl("attention_backward", TORCH_FN(natslm::ops::attention_backward_cuda));
}
