// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/training_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "natslm/base/error.h"
#include "natslm/kernels/cross_entropy.h"
#include "natslm/kernels/fused_norm.h"
#include "natslm/kernels/gelu.h"
#include "natslm/kernels/rotary.h"
#include "natslm/ops/decode.h"
#include "natslm/ops/stream.h"

namespace natslm::ops {
namespace {

using at::Tensor;

void check_array(const Tensor& x, const char* what, at::ScalarType type, at::IntArrayRef shape,
                 const Tensor& beside) {
  NATSLM_CHECK(x.defined() && x.scalar_type() == type && x.sizes() == shape && x.is_contiguous() &&
                   x.device() == beside.device(),
               what, " must be a contiguous ", c10::toString(type), " ", shape, " on ",
               beside.device(), ", got ",
               x.defined() ? std::string(c10::toString(x.scalar_type())) : std::string("nothing"),
               " ", x.defined() ? x.sizes() : at::IntArrayRef(), " on ", x.device());
}

template <class Params>
void run(const Params& p, const Tensor& on) {
  if (on.is_cpu()) {
    kernels::reference::run(p);
  } else {
    kernels::cuda::run(p, current_stream(on.device()));
  }
}

template <class T>
T* data(const Tensor& x) {
  return x.defined() ? x.mutable_data_ptr<T>() : nullptr;
}

void* raw(const Tensor& x) {
  return x.defined() ? x.mutable_data_ptr() : nullptr;
}

}  // namespace

Normed norm(const Tensor& x, const Tensor& branch, const Tensor& weight, const NormOptions& options,
            at::ScalarType dtype) {
  const int64_t rows = x.size(0), width = x.size(1);
  check_array(x, "norm: x", at::kFloat, {rows, width}, x);
  if (branch.defined()) check_array(branch, "norm: branch", dtype, {rows, width}, x);
  check_array(weight, "norm: weight", at::kFloat, {width}, x);
  Normed out{.sum = branch.defined() ? at::empty_like(x) : x,
             .y = at::empty({rows, width}, x.options().dtype(dtype)),
             .mean = at::empty({rows}, x.options()),
             .rstd = at::empty({rows}, x.options())};
  run(kernels::NormForward{.rows = rows,
                           .width = static_cast<int32_t>(width),
                           .epsilon = static_cast<float>(options.epsilon),
                           .centered = options.centered,
                           .dtype = dtype_of(dtype),
                           .x = x.const_data_ptr<float>(),
                           .branch = raw(branch),
                           .weight = weight.const_data_ptr<float>(),
                           .sum = branch.defined() ? data<float>(out.sum) : nullptr,
                           .y = raw(out.y),
                           .mean = data<float>(out.mean),
                           .rstd = data<float>(out.rstd)},
      x);
  return out;
}

Tensor norm_backward(const Normed& forward, const Tensor& weight, const NormOptions& options,
                     const Tensor& dy, const Tensor& dsum, const Tensor& dx, const Tensor& dweight,
                     bool accumulate) {
  const int64_t rows = forward.sum.size(0), width = forward.sum.size(1);
  check_array(dy, "norm: dy", forward.y.scalar_type(), {rows, width}, forward.sum);
  if (dsum.defined()) check_array(dsum, "norm: dsum", at::kFloat, {rows, width}, forward.sum);
  check_array(dx, "norm: dx", at::kFloat, {rows, width}, forward.sum);
  check_array(weight, "norm: weight", at::kFloat, {width}, forward.sum);
  if (dweight.defined()) check_array(dweight, "norm: dweight", at::kFloat, {width}, forward.sum);
  Tensor dbranch = at::empty_like(dy);
  kernels::NormBackward p{.rows = rows,
                          .width = static_cast<int32_t>(width),
                          .centered = options.centered,
                          .dtype = dtype_of(dy.scalar_type()),
                          .sum = forward.sum.const_data_ptr<float>(),
                          .weight = weight.const_data_ptr<float>(),
                          .mean = forward.mean.const_data_ptr<float>(),
                          .rstd = forward.rstd.const_data_ptr<float>(),
                          .dy = raw(dy),
                          .dresidual = data<float>(dsum),
                          .dx = data<float>(dx),
                          .dbranch = raw(dbranch),
                          .dweight = data<float>(dweight),
                          .accumulate = accumulate};
  Tensor workspace;
  if (!dy.is_cpu()) {
    workspace = at::empty({static_cast<int64_t>(kernels::cuda::workspace_bytes(p))},
                          dy.options().dtype(at::kByte));
    p.workspace = raw(workspace);
  }
  run(p, dy);
  return dbranch;
}

Tensor gelu(const Tensor& x) {
  check_array(x, "gelu: x", x.scalar_type(), x.sizes(), x);
  Tensor y = at::empty_like(x);
  run(
      kernels::GeluForward{
          .count = x.numel(), .dtype = dtype_of(x.scalar_type()), .x = raw(x), .y = raw(y)},
      x);
  return y;
}

Tensor gelu_backward_(const Tensor& x, const Tensor& dy, bool want_y) {
  check_array(x, "gelu: x", x.scalar_type(), x.sizes(), x);
  check_array(dy, "gelu: dy", x.scalar_type(), x.sizes(), x);
  Tensor y = want_y ? at::empty_like(x) : Tensor();
  run(kernels::GeluBackward{.count = x.numel(),
                            .dtype = dtype_of(x.scalar_type()),
                            .x = raw(x),
                            .dy = raw(dy),
                            .dx = raw(dy),
                            .y = raw(y)},
      x);
  return y;
}

Tensor gated(const Tensor& x, kernels::GateActivation activation) {
  const int64_t hidden = x.size(-1) / 2;
  check_array(x, "gated: x", x.scalar_type(), x.sizes(), x);
  NATSLM_CHECK(x.size(-1) == 2 * hidden, "gated: x has an odd number of columns: ", x.sizes());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = hidden;
  Tensor y = at::empty(shape, x.options());
  run(kernels::GatedForward{.rows = x.numel() / x.size(-1),
                            .hidden = static_cast<int32_t>(hidden),
                            .activation = activation,
                            .dtype = dtype_of(x.scalar_type()),
                            .x = raw(x),
                            .y = raw(y)},
      x);
  return y;
}

Tensor gated_backward(const Tensor& x, const Tensor& dy, kernels::GateActivation activation) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() /= 2;
  check_array(x, "gated: x", x.scalar_type(), x.sizes(), x);
  check_array(dy, "gated: dy", x.scalar_type(), shape, x);
  Tensor dx = at::empty_like(x);
  run(kernels::GatedBackward{.rows = x.numel() / x.size(-1),
                             .hidden = static_cast<int32_t>(shape.back()),
                             .activation = activation,
                             .dtype = dtype_of(x.scalar_type()),
                             .x = raw(x),
                             .dy = raw(dy),
                             .dx = raw(dx)},
      x);
  return dx;
}

void rotate_heads_(const Tensor& fused, int64_t heads, const Tensor& cos, const Tensor& sin) {
  check_array(fused, "rotary: fused", fused.scalar_type(), fused.sizes(), fused);
  const int64_t batch = fused.size(0), tokens = fused.size(1);
  for (const Tensor* table : {&cos, &sin}) {
    NATSLM_CHECK(table->size(0) >= tokens, "rotary: ", tokens, " tokens are more than the ",
                 table->size(0), " positions of the table");
    check_array(*table, "rotary: table", at::kFloat, cos.sizes(), fused);
  }
  run(kernels::RotaryForward{.batch = static_cast<int32_t>(batch),
                             .tokens = static_cast<int32_t>(tokens),
                             .heads = static_cast<int32_t>(heads),
                             .head_dim = static_cast<int32_t>(2 * cos.size(1)),
                             .dtype = dtype_of(fused.scalar_type()),
                             .x = raw(fused),
                             .columns = fused.size(2),
                             .cos = cos.const_data_ptr<float>(),
                             .sin = sin.const_data_ptr<float>()},
      fused);
}

Tensor rotate_heads_backward(const Tensor& dq_in, const Tensor& dk_in, const Tensor& dv_in,
                             const Tensor& drest, int64_t columns, const Tensor& cos,
                             const Tensor& sin) {
  const auto readable = [](const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const Tensor dq = readable(dq_in), dk = readable(dk_in), dv = readable(dv_in);
  const int64_t batch = dq.size(0), tokens = dq.size(2), rest = drest.defined() ? drest.size(2) : 0;
  if (drest.defined()) check_array(drest, "rotary: drest", at::kFloat, {batch, tokens, rest}, dq);
  const auto strides = [](const Tensor& x) {
    return kernels::Strides{x.stride(0), x.stride(1), x.stride(2)};
  };
  Tensor dfused = at::empty({batch, tokens, columns}, dq.options());
  run(kernels::RotaryBackward{.batch = static_cast<int32_t>(batch),
                              .tokens = static_cast<int32_t>(tokens),
                              .q_heads = static_cast<int32_t>(dq.size(1)),
                              .kv_heads = static_cast<int32_t>(dk.size(1)),
                              .head_dim = static_cast<int32_t>(dq.size(3)),
                              .dtype = dtype_of(dq.scalar_type()),
                              .dq = raw(dq),
                              .dk = raw(dk),
                              .dv = raw(dv),
                              .dq_stride = strides(dq),
                              .dk_stride = strides(dk),
                              .dv_stride = strides(dv),
                              .drest = data<float>(drest),
                              .rest = static_cast<int32_t>(rest),
                              .cos = cos.const_data_ptr<float>(),
                              .sin = sin.const_data_ptr<float>(),
                              .dfused = raw(dfused),
                              .columns = columns},
      dq);
  return dfused;
}

Tensor cross_entropy_rows_(const Tensor& logits, const Tensor& targets, int64_t vocabulary,
                           bool gradient, double weight, const Tensor& weights) {
  const int64_t rows = logits.size(0);
  check_array(logits, "cross entropy: logits", logits.scalar_type(), logits.sizes(), logits);
  check_array(targets, "cross entropy: targets", at::kInt, {rows}, logits);
  if (weights.defined()) check_array(weights, "cross entropy: weights", at::kFloat, {rows}, logits);
  Tensor loss = at::empty({rows}, logits.options().dtype(at::kFloat));
  run(kernels::CrossEntropy{.rows = rows,
                            .vocabulary = static_cast<int32_t>(vocabulary),
                            .columns = static_cast<int32_t>(logits.size(1)),
                            .dtype = dtype_of(logits.scalar_type()),
                            .logits = raw(logits),
                            .targets = targets.const_data_ptr<int32_t>(),
                            .loss = data<float>(loss),
                            .gradient = gradient,
                            .weight = static_cast<float>(weight),
                            .weights = data<float>(weights)},
      logits);
  return loss;
}

}  // namespace natslm::ops
