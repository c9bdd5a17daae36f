// Inside ops/: what the backends of natslm::attention share. Checks, and description of tensors as
// kernel parameters.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/ops/parallel.h"

namespace natslm::ops {

using OptionalTensor = std::optional<at::Tensor>;

// The operators' signatures; `path` is a kernels::AttentionPath or -1.
using AttentionOp = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& last,
    const OptionalTensor& lengths, double scale, bool want_mass, const OptionalTensor& order,
    const OptionalTensor& ends, int64_t reach, double density, int64_t path);
using AttentionBackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const at::Tensor& last,
    const OptionalTensor& lengths, double scale, const OptionalTensor& horizons,
    const OptionalTensor& role_lse, bool limit_factor, const OptionalTensor& order,
    const OptionalTensor& ends, int64_t reach, double density, int64_t path);
AttentionOp attention_cuda;
AttentionBackwardOp attention_backward_cuda;

// All throw c10::Error naming the argument.
void check_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const OptionalTensor& lengths, double scale);
void check_integers(const at::Tensor& x, const char* name, at::IntArrayRef shape,
                    const at::Tensor& q);
void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& last, const OptionalTensor& lengths, double scale);
// Returns the number of horizons.
int64_t check_attention_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                                 const OptionalTensor& horizons);

inline kernels::Strides strides(const at::Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

// Like x, but dense, with heads and tokens in the order in which x has them in memory.
at::Tensor empty_in_order_of(const at::Tensor& x);
// Of the output: what follows attention is a projection of all heads of a token.
at::Tensor empty_token_major(const at::Tensor& q);

inline at::Tensor contiguous_or_none(const OptionalTensor& x) {
  return x ? x->contiguous() : at::Tensor();
}

template <class T>
const T* data_or_null(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// The outputs of the forward pass and its parameters; the tensors must outlive the parameters.
struct ForwardCall {
  ForwardCall(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& last,
              const at::Tensor& lengths, double scale, bool want_mass);
  at::Tensor out, lse, mass;
  kernels::AttentionForward params;
};

struct BackwardCall {
  BackwardCall(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
               const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
               const at::Tensor& last, const at::Tensor& lengths, double scale,
               const at::Tensor& horizons, const at::Tensor& role_lse, bool limit_factor);
  at::Tensor dq, dk, dv, role_sums;
  kernels::AttentionBackward params;
};

}  // namespace natslm::ops
