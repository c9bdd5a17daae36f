// The method in double precision with explicit T x T matrices and LibTorch's own autograd: what the
// operator, the roles and their gradients are compared with. Slow and plain on purpose.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "natslm/base/lifetime.h"

namespace natslm::testing {

struct MethodInput {
  at::Tensor q, k, v, dout;  // [B, H, T, D], any floating type
  at::Tensor last;           // [B, Hkv, T] int32
  at::Tensor horizons;       // [R, B, Hkv, T] int32, or undefined
  at::Tensor lengths;        // [B] int32, or undefined: all T
  double scale = 1;
  bool limit_factor = true, causal_normalizer = false;
};

struct MethodOutput {
  at::Tensor out, dq, dk, dv;  // double
  at::Tensor g;     // [B, Hkv, T(i), T(j)]: g_ij of every causal pair, summed over the group
  at::Tensor u;     // [B, Hkv, T, R]
  at::Tensor mass;  // [B, Hkv, T]
  at::Tensor
      mask_gradient;  // [B, Hkv, T, T]: exact derivative for the mask's entries (by autograd)
};

inline MethodOutput method_model(const MethodInput& in) {
  using at::Tensor;
  const int64_t b = in.q.size(0), hq = in.q.size(1), t = in.q.size(2), d = in.q.size(3);
  const int64_t hkv = in.k.size(1), r = hq / hkv;
  const Tensor q = in.q.detach().to(at::kDouble).clone().requires_grad_(true);
  const Tensor k = in.k.detach().to(at::kDouble).clone().requires_grad_(true);
  const Tensor v = in.v.detach().to(at::kDouble).clone().requires_grad_(true);
  const Tensor dout = in.dout.detach().to(at::kDouble);
  const auto grouped = [&](const Tensor& x) {  // KV head for each query head
    return x.unsqueeze(2).expand({b, hkv, r, t, d}).reshape({b, hq, t, d});
  };
  const Tensor position = at::arange(t, in.last.options().dtype(at::kLong));
  const Tensor i = position.view({t, 1}), j = position.view({1, t});
  Tensor valid = at::ones_like(in.last, at::kBool);
  if (in.lengths.defined())
    valid = position.view({1, 1, t}).lt(in.lengths.view({b, 1, 1})).expand_as(in.last);
  const Tensor causal = (j.le(i)).logical_and(valid.unsqueeze(2)).logical_and(valid.unsqueeze(3));
  const Tensor visible =
      causal.logical_and(i.le(in.last.to(at::kLong).unsqueeze(2)));  // [B, Hkv, T, T]
  const auto per_query_head = [&](const Tensor& x) {
    return x.unsqueeze(2).expand({b, hkv, r, t, t}).reshape({b, hq, t, t});
  };
  const Tensor mask = visible.to(at::kDouble).requires_grad_(true);
  const Tensor m = per_query_head(mask);
  const Tensor s = in.scale * q.matmul(grouped(k).transpose(2, 3));
  const Tensor e = at::exp(s) * per_query_head(causal).to(at::kDouble);
  const Tensor z = (e * m).sum(-1, true);
  const Tensor safe = at::where(z > 0, z, at::ones_like(z));
  MethodOutput result;
  const Tensor out = (e * m / safe).matmul(grouped(v));
  (out * dout).sum().backward();
  result.out = out.detach();
  result.dq = q.grad();
  result.dk = k.grad();
  result.dv = v.grad();
  result.mask_gradient = mask.grad();

  const Tensor probability = (e * m / safe).detach();
  result.mass = probability.view({b, hkv, r, t, t}).sum({2, 3});
  const Tensor normaliser = in.causal_normalizer ? e.sum(-1, true) : z;
  Tensor factor = (e / at::where(normaliser > 0, normaliser, at::ones_like(z))).detach();
  if (in.limit_factor) factor = at::minimum(factor, at::ones_like(factor));
  const Tensor dp = dout.matmul(grouped(v.detach()).transpose(2, 3));
  const Tensor delta = (dout * result.out).sum(-1, true);
  const Tensor seen = (z > 0).to(at::kDouble);  // a row that sees no key adds nothing
  result.g = (factor * (dp - delta) * seen).view({b, hkv, r, t, t}).sum(2);
  if (in.horizons.defined()) {
    const Tensor within = i.le(in.horizons.to(at::kLong).unsqueeze(3));  // [R, B, Hkv, T, T]
    result.u = (result.g.unsqueeze(0) * within.to(at::kDouble)).sum(3).permute({1, 2, 3, 0});
  }
  return result;
}

}  // namespace natslm::testing
