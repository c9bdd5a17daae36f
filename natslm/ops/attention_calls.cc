// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/attention_calls.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "natslm/base/lifetime.h"

namespace natslm::ops {
namespace {

using at::Tensor;

void check_one(const Tensor& x, const char* name, const Tensor& q) {
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

// What forward and backward share.
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
  return p;
}

}  // namespace

void check_integers(const Tensor& x, const char* name, at::IntArrayRef shape, const Tensor& q) {
  TORCH_CHECK(x.scalar_type() == at::kInt, "attention: ", name, " must be int32, got ",
              x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, "attention: ", name, " must be ", shape, ", got ", x.sizes());
  TORCH_CHECK(x.device() == q.device(), "attention: ", name, " is on ", x.device(), ", q on ",
              q.device());
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lengths,
                 double scale) {
  check_one(q, "q", q);
  check_one(k, "k", q);
  check_one(v, "v", q);
  TORCH_CHECK(k.size(1) == v.size(1), "attention: v has ", v.size(1), " heads, k has ", k.size(1));
  TORCH_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: q has ",
              q.size(1), " heads, which is no multiple of the ", k.size(1), " KV heads");
  TORCH_CHECK(q.size(3) >= 8 && q.size(3) % 8 == 0 && q.size(3) <= 256, "attention: head size ",
              q.size(3), " is not a multiple of 8 up to 256");
  TORCH_CHECK(q.size(2) <= kMaxPosition, "attention: ", q.size(2), " tokens are too many");
  TORCH_CHECK(std::isfinite(scale), "attention: scale must be finite, got ", scale);
  if (lengths) check_integers(*lengths, "lengths", {q.size(0)}, q);
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& last,
                     const OptionalTensor& lengths, double scale) {
  check_heads(q, k, v, lengths, scale);
  check_integers(last, "last", {q.size(0), k.size(1), q.size(2)}, q);
}

int64_t check_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                 const OptionalTensor& horizons) {
  TORCH_CHECK(dout.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type(),
              "attention_backward: dout ", dout.sizes(), " ", dout.scalar_type(),
              " does not fit q ", q.sizes(), " ", q.scalar_type());
  const int64_t count = horizons ? horizons->size(0) : 0;
  TORCH_CHECK(count <= kernels::kMaxHorizons, "attention_backward: ", count, " horizons; at most ",
              kernels::kMaxHorizons, " are possible");
  if (horizons) {
    check_integers(*horizons, "horizons", {count, q.size(0), k.size(1), q.size(2)}, q);
  }
  return count;
}

Tensor empty_in_order_of(const Tensor& x) {
  const int64_t b = x.size(0), h = x.size(1), t = x.size(2), d = x.size(3);
  if (x.stride(1) >= x.stride(2)) return at::empty({b, h, t, d}, x.options());
  return at::empty({b, t, h, d}, x.options()).transpose(1, 2);
}

Tensor empty_token_major(const Tensor& q) {
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

ForwardCall::ForwardCall(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& last,
                         const Tensor& lengths, double scale, bool want_mass)
    : out(empty_token_major(q)),
      lse(at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat))),
      mass(at::empty(want_mass ? last.sizes() : at::IntArrayRef{0}, lse.options())),
      params(describe<kernels::AttentionForward>(q, k, v, last, lengths, scale)) {
  params.out = out.mutable_data_ptr();
  params.out_stride = strides(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.mass = want_mass ? mass.mutable_data_ptr<float>() : nullptr;
}

BackwardCall::BackwardCall(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& out, const Tensor& lse, const Tensor& last,
                           const Tensor& lengths, double scale, const Tensor& horizons,
                           const Tensor& role_lse, bool limit_factor)
    : dq(empty_in_order_of(q)),
      dk(empty_in_order_of(k)),
      dv(empty_in_order_of(v)),
      role_sums(
          at::empty({horizons.defined() ? horizons.size(0) : 0, q.size(0), k.size(1), q.size(2)},
                    q.options().dtype(at::kFloat))),
      params(describe<kernels::AttentionBackward>(q, k, v, last, lengths, scale)) {
  params.out = out.const_data_ptr();
  params.dout = dout.const_data_ptr();
  params.out_stride = strides(out);
  params.dout_stride = strides(dout);
  params.lse = lse.const_data_ptr<float>();
  params.horizon_count = static_cast<int32_t>(role_sums.size(0));
  params.horizons = data_or_null<int32_t>(horizons);
  params.role_lse = data_or_null<float>(role_lse);
  params.limit_factor = limit_factor;
  params.dq = dq.mutable_data_ptr();
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  params.dq_stride = strides(dq);
  params.dk_stride = strides(dk);
  params.dv_stride = strides(dv);
  params.role_sums = params.horizon_count ? role_sums.mutable_data_ptr<float>() : nullptr;
}

}  // namespace natslm::ops
