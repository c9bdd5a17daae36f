// Checks, description (tensors -> kernel parameters), registration and gradient of
// natslm::attention. Nothing here computes attention: see natslm/kernels.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
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
#include "natslm/ops/parallel.h"

namespace natslm::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto kForwardSchema =
    "attention(Tensor q, Tensor k, Tensor v, Tensor last, Tensor? lengths, float scale, "
    "bool want_mass) -> (Tensor out, Tensor lse, Tensor mass)";
constexpr auto kBackwardSchema =
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor last, Tensor? lengths, float scale, Tensor? horizons, Tensor? role_lse, "
    "bool limit_factor) -> (Tensor dq, Tensor dk, Tensor dv, Tensor role_sums)";

void check_heads(const Tensor& x, const char* name, const Tensor& q) {
  TORCH_CHECK(x.dim() == 4, "attention: ", name, " must be [B, H, T, D], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "attention: ", name, " must be float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(x.scalar_type() == q.scalar_type(), "attention: ", name, " is ", x.scalar_type(),
              " but q is ", q.scalar_type());
  TORCH_CHECK(x.size(0) == q.size(0) && x.size(2) == q.size(2) && x.size(3) == q.size(3),
              "attention: ", name, " ", x.sizes(), " does not fit q ", q.sizes(),
              "; all axes but the heads must agree");
  TORCH_CHECK(x.device() == q.device(), "attention: ", name, " is on ", x.device(), ", q on ",
              q.device());
}

void check_integers(const Tensor& x, const char* name, at::IntArrayRef shape, const Tensor& q) {
  TORCH_CHECK(x.scalar_type() == at::kInt, "attention: ", name, " must be int32, got ",
              x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, "attention: ", name, " must be ", shape, ", got ", x.sizes());
  TORCH_CHECK(x.device() == q.device(), "attention: ", name, " is on ", x.device(), ", q on ",
              q.device());
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& last,
           const OptionalTensor& lengths, double scale) {
  check_heads(q, "q", q);
  check_heads(k, "k", q);
  check_heads(v, "v", q);
  TORCH_CHECK(k.size(1) == v.size(1), "attention: v has ", v.size(1), " heads, k has ", k.size(1));
  TORCH_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: q has ",
              q.size(1), " heads, which is no multiple of the ", k.size(1), " KV heads");
  TORCH_CHECK(q.size(3) >= 8 && q.size(3) % 8 == 0 && q.size(3) <= 256, "attention: head size ",
              q.size(3), " is not a multiple of 8 up to 256");
  TORCH_CHECK(q.size(2) <= kMaxPosition, "attention: ", q.size(2), " tokens are too many");
  TORCH_CHECK(std::isfinite(scale), "attention: scale must be finite, got ", scale);
  check_integers(last, "last", {q.size(0), k.size(1), q.size(2)}, q);
  if (lengths) check_integers(*lengths, "lengths", {q.size(0)}, q);
}

// The kernels take any strides but the last.
Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

kernels::Strides strides(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

// Like x, but dense, with heads and tokens in the order in which x has them in memory.
Tensor empty_in_order_of(const Tensor& x) {
  const int64_t b = x.size(0), h = x.size(1), t = x.size(2), d = x.size(3);
  if (x.stride(1) >= x.stride(2)) return at::empty({b, h, t, d}, x.options());
  return at::empty({b, t, h, d}, x.options()).transpose(1, 2);
}

Tensor contiguous_or_none(const OptionalTensor& x) {
  return x ? x->contiguous() : Tensor();
}

template <class T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// What forward and backward share. The tensors must outlive the parameters.
template <class Params>
Params describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& last,
                const Tensor& lengths, double scale) {
  Params p;
  p.batch = static_cast<int32_t>(q.size(0));
  p.q_heads = static_cast<int32_t>(q.size(1));
  p.kv_heads = static_cast<int32_t>(k.size(1));
  p.tokens = static_cast<int32_t>(q.size(2));
  p.head_dim = static_cast<int32_t>(q.size(3));
  p.scale = static_cast<float>(scale);
  p.dtype = q.scalar_type() == at::kFloat ? DType::kFloat32 : DType::kBFloat16;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_stride = strides(q);
  p.k_stride = strides(k);
  p.v_stride = strides(v);
  p.last = last.const_data_ptr<int32_t>();
  p.lengths = data_or_null<int32_t>(lengths);
  p.parallel = torch_threads();
  return p;
}

template <class Params>
void run_cpu(const Params& p) {
  const std::string_view reason = kernels::cpu::why_not(p);
  TORCH_CHECK(reason.empty(), "attention: ", std::string(reason));
  kernels::cpu::run(p);
}

std::tuple<Tensor, Tensor, Tensor> attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                                 const Tensor& v_in, const Tensor& last_in,
                                                 const OptionalTensor& lengths_in, double scale,
                                                 bool want_mass) {
  check(q_in, k_in, v_in, last_in, lengths_in, scale);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
               v = with_contiguous_rows(v_in), last = last_in.contiguous(),
               lengths = contiguous_or_none(lengths_in);
  const auto floats = q.options().dtype(at::kFloat);
  // What follows attention is a projection of all heads of a token.
  Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, floats);
  Tensor mass = want_mass ? at::empty(last.sizes(), floats) : at::empty({0}, floats);
  auto p = describe<kernels::AttentionForward>(q, k, v, last, lengths, scale);
  p.out = out.mutable_data_ptr();
  p.out_stride = strides(out);
  p.lse = lse.mutable_data_ptr<float>();
  p.mass = want_mass ? mass.mutable_data_ptr<float>() : nullptr;
  run_cpu(p);
  return {out, lse, mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const Tensor& last_in,
    const OptionalTensor& lengths_in, double scale, const OptionalTensor& horizons_in,
    const OptionalTensor& role_lse_in, bool limit_factor) {
  check(q_in, k_in, v_in, last_in, lengths_in, scale);
  TORCH_CHECK(dout_in.sizes() == q_in.sizes() && dout_in.scalar_type() == q_in.scalar_type(),
              "attention_backward: dout ", dout_in.sizes(), " ", dout_in.scalar_type(),
              " does not fit q ", q_in.sizes(), " ", q_in.scalar_type());
  const int64_t count = horizons_in ? horizons_in->size(0) : 0;
  TORCH_CHECK(count <= kernels::kMaxHorizons, "attention_backward: ", count, " horizons; at most ",
              kernels::kMaxHorizons, " are possible");
  if (horizons_in) {
    check_integers(*horizons_in, "horizons", {count, q_in.size(0), k_in.size(1), q_in.size(2)},
                   q_in);
  }
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
               v = with_contiguous_rows(v_in), out = with_contiguous_rows(out_in),
               dout = with_contiguous_rows(dout_in), last = last_in.contiguous(),
               lengths = contiguous_or_none(lengths_in), lse = lse_in.contiguous(),
               horizons = contiguous_or_none(horizons_in),
               role_lse = contiguous_or_none(role_lse_in);
  Tensor dq = empty_in_order_of(q), dk = empty_in_order_of(k), dv = empty_in_order_of(v);
  Tensor role_sums =
      at::empty({count, q.size(0), k.size(1), q.size(2)}, q.options().dtype(at::kFloat));

  auto p = describe<kernels::AttentionBackward>(q, k, v, last, lengths, scale);
  p.out = out.const_data_ptr();
  p.dout = dout.const_data_ptr();
  p.out_stride = strides(out);
  p.dout_stride = strides(dout);
  p.lse = lse.const_data_ptr<float>();
  p.horizon_count = static_cast<int32_t>(count);
  p.horizons = data_or_null<int32_t>(horizons);
  p.role_lse = data_or_null<float>(role_lse);
  p.limit_factor = limit_factor;
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  p.dq_stride = strides(dq);
  p.dk_stride = strides(dk);
  p.dv_stride = strides(dv);
  p.role_sums = count ? role_sums.mutable_data_ptr<float>() : nullptr;
  run_cpu(p);
  return {dq, dk, dv, role_sums};
}

// Through the dispatcher, so that the tensors' device chooses the backend.
std::tuple<Tensor, Tensor, Tensor> call_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& last, const OptionalTensor& lengths,
                                                double scale, bool want_mass) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("natslm::attention", "")
                             .typed<decltype(attention_cpu)>();
  return op.call(q, k, v, last, lengths, scale, want_mass);
}

template <class... Args>
auto call_backward(const Args&... args) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("natslm::attention_backward", "")
                             .typed<decltype(attention_backward_cpu)>();
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
                               bool end_term, bool want_mass) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, lse, mass] = call_forward(q, k, v, last, lengths, scale, want_mass);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["limit_factor"] = limit_factor;
    ctx->saved_data["causal_normalizer"] = causal_normalizer;
    ctx->saved_data["end_term"] = end_term;
    ctx->save_for_backward({q, k, v, out, lse, last, lengths.value_or(Tensor()),
                            horizons.value_or(Tensor()), end_term ? *onehot : Tensor()});
    ctx->mark_non_differentiable({lse, mass});
    return {out, lse, mass};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4],
                 &last = saved[5], &horizons = saved[7], &onehot = saved[8];
    const OptionalTensor lengths = saved[6].defined() ? OptionalTensor(saved[6]) : std::nullopt;
    const double scale = ctx->saved_data["scale"].toDouble();
    const bool limit_factor = ctx->saved_data["limit_factor"].toBool();
    const bool end_term = ctx->saved_data["end_term"].toBool();

    OptionalTensor role_horizons, role_lse;
    if (horizons.defined()) {
      role_horizons = end_term ? with_second_global(horizons) : horizons;
      if (ctx->saved_data["causal_normalizer"].toBool()) {
        role_lse = std::get<1>(
            call_forward(q, k, v, at::full_like(last, kForever), lengths, scale, false));
      }
    }
    auto [dq, dk, dv, sums] = call_backward(grads[0], q, k, v, out, lse, last, lengths, scale,
                                            role_horizons, role_lse, limit_factor);
    Tensor donehot;
    if (horizons.defined()) {
      if (end_term) sums = apply_end_term(sums, onehot, horizons);
      donehot = sums.permute({1, 2, 3, 0});
    }
    return {dq, dk, dv, donehot, {}, {}, {}, {}, {}, {}, {}, {}};
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

AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& last,
                          const OptionalTensor& lengths, std::optional<double> scale,
                          const std::optional<RoleInputs>& roles, bool want_mass) {
  TORCH_CHECK(q.dim() == 4, "attention: q must be [B, Hq, T, D], got ", q.sizes());
  const double factor =
      scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(q.size(3), 1))));
  check(q, k, v, last, lengths, factor);
  if (roles) check_roles(*roles, last);
  const RoleInputs r = roles.value_or(RoleInputs{});
  const OptionalTensor onehot = roles ? OptionalTensor(r.onehot) : std::nullopt;
  const OptionalTensor horizons = roles ? OptionalTensor(r.horizons) : std::nullopt;
  const variable_list results =
      AttentionFunction::apply(q, k, v, onehot, last, lengths, horizons, factor, r.limit_factor,
                               r.causal_normalizer, r.end_term, want_mass);
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
