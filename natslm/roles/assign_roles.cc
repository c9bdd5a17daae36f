// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/assign_roles.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include "natslm/kernels/attention_forward.h"
#include "natslm/ops/parallel.h"
#include "natslm/ops/stream.h"
#include "natslm/roles/assignment.h"
#include "natslm/roles/lifetimes.h"

namespace natslm::roles {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

// Waking other threads costs more than a few thousand tokens' work.
ParallelFor threads_for(int64_t tokens) {
  constexpr int64_t kFewTokens = 2048;
  return tokens <= kFewTokens ? serial() : ops::torch_threads();
}

struct Outputs {
  AssignedRoles assigned;  // but for the price
  Tensor soft;             // undefined unless sampling
};

Outputs run(const Tensor& logits_in, const Options& options, const Tensor& lengths,
            const std::optional<Noise>& noise, const Tensor& bias) {
  // bfloat16 is widened element by element; sampling in it would make ties out of differences.
  const bool as_it_is =
      logits_in.scalar_type() == at::kFloat || logits_in.scalar_type() == at::kBFloat16;
  Tensor logits = as_it_is ? logits_in : logits_in.to(at::kFloat);
  if (logits.stride(2) != 1) logits = logits.contiguous();
  const int64_t b = logits.size(0), t = logits.size(1), h = logits.size(2) / kRoles;
  const auto floats = logits.options().dtype(at::kFloat).requires_grad(false);
  const auto integers = floats.dtype(at::kInt);

  Outputs out;
  AssignedRoles& a = out.assigned;
  a.roles = at::empty({b, h, t}, floats.dtype(at::kChar));
  a.last = at::empty({b, h, t}, integers);
  a.horizons = at::empty({kRoles, b, h, t}, integers);
  a.onehot = at::empty({b, h, t, kRoles}, floats);
  a.shares = at::empty({b, h, kShares}, floats);
  a.order = at::empty({b, h, t}, integers);
  a.ends = at::empty({b, h, kernels::KeyOrder::kSegments}, integers);
  a.reach = key_reach(options);
  if (noise) out.soft = at::empty({b, h, t / options.chunk, kRoles}, floats);
  const Tensor sequences =
      noise && noise->sequences.defined() ? noise->sequences.contiguous() : Tensor();

  Assignment p;
  p.batch = static_cast<int32_t>(b);
  p.kv_heads = static_cast<int32_t>(h);
  p.tokens = static_cast<int32_t>(t);
  p.options = options;
  p.logits = logits.const_data_ptr();
  p.logits_dtype = logits.scalar_type() == at::kFloat ? DType::kFloat32 : DType::kBFloat16;
  p.logits_batch_stride = logits.stride(0);
  p.logits_token_stride = logits.stride(1);
  p.lengths = data_or_null<int32_t>(lengths);
  p.bias = data_or_null<float>(bias);
  p.sample = noise.has_value();
  if (noise) {
    p.seed = noise->seed;
    p.step = noise->step;
    p.device_step = data_or_null<int64_t>(noise->device_step);
    p.layer = noise->layer;
    p.first_head = noise->first_head;
    p.soft = out.soft.mutable_data_ptr<float>();
  }
  p.sequences = data_or_null<int64_t>(sequences);
  p.roles = a.roles.mutable_data_ptr<int8_t>();
  p.last = a.last.mutable_data_ptr<int32_t>();
  p.horizons = a.horizons.mutable_data_ptr<int32_t>();
  p.onehot = a.onehot.mutable_data_ptr<float>();
  p.shares = a.shares.mutable_data_ptr<float>();
  p.order = a.order.mutable_data_ptr<int32_t>();
  p.ends = a.ends.mutable_data_ptr<int32_t>();
  if (logits.is_cpu()) {
    if (p.device_step) p.step = *p.device_step;
    p.parallel = threads_for(b * h * t);
    assign(p);
    return out;
  }
  const c10::DeviceGuard guard(logits.device());
  const std::string_view why_not = cuda::why_not(p);
  TORCH_CHECK(why_not.empty(), "assign_roles: ", why_not);
  const Tensor workspace =
      at::empty({static_cast<int64_t>(cuda::workspace_bytes(p))}, floats.dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  cuda::assign(p, ops::current_stream(logits.device()));
  return out;
}

class SampleRoles : public torch::autograd::Function<SampleRoles> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Options& options,
                               const std::optional<Tensor>& lengths_in, const Noise& noise,
                               const std::optional<Tensor>& bias_in) {
    const Tensor lengths = lengths_in.value_or(Tensor()), bias = bias_in.value_or(Tensor());
    at::AutoDispatchBelowADInplaceOrView below;
    Outputs out = run(logits, options, lengths, noise, bias);
    AssignedRoles& a = out.assigned;
    ctx->saved_data["chunk"] = int64_t{options.chunk};
    ctx->saved_data["dtype"] = logits.scalar_type();
    ctx->save_for_backward({lengths, a.horizons, out.soft});
    ctx->mark_non_differentiable({a.roles, a.last, a.horizons, a.shares, a.order, a.ends});
    ctx->set_materialize_grads(false);
    const Tensor price = a.shares.select(-1, kPairs).mean();
    return {a.onehot, price, a.roles, a.last, a.horizons, a.shares, a.order, a.ends};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &lengths = saved[0], &horizons = saved[1], &soft = saved[2];
    const int64_t b = horizons.size(1), h = horizons.size(2), t = horizons.size(3);
    Tensor dlogits = at::empty({b, t, kRoles * h}, soft.options());

    AssignmentGradient p;
    p.batch = static_cast<int32_t>(b);
    p.kv_heads = static_cast<int32_t>(h);
    p.tokens = static_cast<int32_t>(t);
    p.chunk = static_cast<int32_t>(ctx->saved_data["chunk"].toInt());
    p.lengths = data_or_null<int32_t>(lengths);
    p.horizons = horizons.const_data_ptr<int32_t>();
    p.soft = soft.const_data_ptr<float>();
    if (grads[0].defined()) {
      p.donehot = grads[0].const_data_ptr<float>();
      p.batch_stride = grads[0].stride(0);
      p.head_stride = grads[0].stride(1);
      p.token_stride = grads[0].stride(2);
      p.role_stride = grads[0].stride(3);
    }
    p.dlogits = dlogits.mutable_data_ptr<float>();
    if (dlogits.is_cpu()) {
      if (grads[1].defined()) p.dprice = grads[1].item<double>();
      p.parallel = threads_for(b * h * t);
      assign_backward(p);
    } else {
      const c10::DeviceGuard guard(dlogits.device());
      p.device_dprice = data_or_null<float>(grads[1]);
      cuda::assign_backward(p, ops::current_stream(dlogits.device()));
    }
    return {dlogits.to(ctx->saved_data["dtype"].toScalarType()), {}, {}, {}, {}};
  }
};

}  // namespace

AssignedRoles assign_roles(const Tensor& logits, const Options& options,
                           const std::optional<Tensor>& lengths_in,
                           const std::optional<Noise>& noise, const Tensor& bias_in) {
  check(options);
  TORCH_CHECK(options.set != RoleSet::kDense, "assign_roles: dense attention has no roles");
  TORCH_CHECK(logits.dim() == 3 && logits.size(2) > 0 && logits.size(2) % kRoles == 0,
              "assign_roles: logits must be [B, T, 3 * Hkv], got ", logits.sizes());
  TORCH_CHECK(logits.is_floating_point(), "assign_roles: logits must be floating point, got ",
              logits.scalar_type());
  TORCH_CHECK(logits.is_cpu() || logits.is_cuda(), "assign_roles: there is no code for ",
              logits.device(), "; move the logits to the CPU or to a CUDA device");
  const auto on_device_of_logits = [&](const char* name, const Tensor& x) {
    TORCH_CHECK(x.device() == logits.device(), "assign_roles: ", name, " must be on ",
                logits.device(), " as the logits, got ", x.device());
  };
  const int64_t b = logits.size(0), t = logits.size(1);
  Tensor lengths, bias;
  if (lengths_in) {
    TORCH_CHECK(lengths_in->scalar_type() == at::kInt && lengths_in->sizes() == at::IntArrayRef{b},
                "assign_roles: lengths must be int32 [", b, "], got ", lengths_in->scalar_type(),
                " ", lengths_in->sizes());
    on_device_of_logits("lengths", *lengths_in);
    lengths = lengths_in->contiguous();
    for (int64_t i = 0; lengths.is_cpu() && i < b; ++i) {
      const int32_t length = lengths.const_data_ptr<int32_t>()[i];
      TORCH_CHECK(length >= 0 && length <= t, "assign_roles: length ", length, " of sequence ", i,
                  " is not in 0..", t);
    }
  }
  if (bias_in.defined()) {
    TORCH_CHECK(bias_in.scalar_type() == at::kFloat && bias_in.sizes() == at::IntArrayRef{b},
                "assign_roles: bias must be float32 [", b, "], got ", bias_in.scalar_type(), " ",
                bias_in.sizes());
    on_device_of_logits("bias", bias_in);
    bias = bias_in.contiguous();
  }
  if (!noise) {
    Outputs out = run(logits, options, lengths, noise, bias);
    out.assigned.price = out.assigned.shares.select(-1, kPairs).mean();
    return out.assigned;
  }
  if (noise->sequences.defined()) {
    TORCH_CHECK(noise->sequences.scalar_type() == at::kLong &&
                    noise->sequences.sizes() == at::IntArrayRef{b},
                "assign_roles: sequences must be int64 [", b, "], got ",
                noise->sequences.scalar_type(), " ", noise->sequences.sizes());
    on_device_of_logits("sequences", noise->sequences);
  }
  if (noise->device_step.defined()) {
    TORCH_CHECK(noise->device_step.scalar_type() == at::kLong && noise->device_step.numel() == 1,
                "assign_roles: device_step must be one int64, got ",
                noise->device_step.scalar_type(), " ", noise->device_step.sizes());
    on_device_of_logits("device_step", noise->device_step);
  }
  const auto optional = [](const Tensor& x) {
    return x.defined() ? std::optional(x) : std::nullopt;
  };
  const variable_list r =
      SampleRoles::apply(logits, options, optional(lengths), *noise, optional(bias));
  return {.roles = r[2],
          .last = r[3],
          .horizons = r[4],
          .onehot = r[0],
          .price = r[1],
          .shares = r[5],
          .order = r[6],
          .ends = r[7],
          .reach = key_reach(options)};
}

}  // namespace natslm::roles
