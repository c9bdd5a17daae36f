// natslm::attention on the GPU: chooses a path by kernels/crossover.h and runs it on LibTorch's
// current stream. Nothing waits for the device.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <iterator>
#include <optional>
#include <string>

#include "natslm/kernels/crossover.h"
#include "natslm/kernels/gpu_head_dim.h"
#include "natslm/ops/attention_calls.h"
#include "natslm/ops/stream.h"

namespace natslm::ops {
namespace {

using at::Tensor;
using kernels::AttentionPath;

// Rows as the GPU kernels want them: whole head size, contiguous, 16-byte aligned.
Tensor kernel_rows(const Tensor& x) {
  const int64_t padding = kernels::gpu_head_dim(static_cast<int32_t>(x.size(3))) - x.size(3);
  if (padding > 0) return at::constant_pad_nd(x, {0, padding});
  const int64_t alignment = 16 / x.element_size();
  bool aligned = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) {
    aligned = aligned && (x.size(axis) == 1 || x.stride(axis) % alignment == 0);
  }
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

// Strides along axes of size 1 mean nothing to LibTorch, but kernels check them.
void tidy(kernels::Strides& stride, const Tensor& x) {
  if (x.size(0) == 1) stride.batch = x.size(1) * x.size(2) * x.size(3);
  if (x.size(1) == 1) stride.head = x.size(2) * x.size(3);
  if (x.size(2) == 1) stride.token = x.size(3);
}

kernels::KeyOrder key_order(const Tensor& order, const Tensor& ends, int64_t reach) {
  if (!order.defined()) return {};
  return {order.const_data_ptr<int32_t>(), ends.const_data_ptr<int32_t>(),
          static_cast<int32_t>(reach)};
}

void check_order(const OptionalTensor& order, const OptionalTensor& ends, int64_t reach,
                 const Tensor& q, const Tensor& k) {
  TORCH_CHECK(order.has_value() == ends.has_value(),
              "attention: order and ends come together or not at all");
  if (!order) return;
  check_integers(*order, "order", {q.size(0), k.size(1), q.size(2)}, q);
  check_integers(*ends, "ends", {q.size(0), k.size(1), kernels::KeyOrder::kSegments}, q);
  TORCH_CHECK(reach >= 0 && reach <= INT32_MAX, "attention: reach must not be negative, got ",
              reach);
}

template <class Params>
void run(Params& p, double density, int64_t wanted, const Tensor& q) {
  if (q.numel() == 0) return;
  std::optional<AttentionPath> path;
  if (wanted >= 0) {
    TORCH_CHECK(wanted < std::ssize(kernels::kAttentionPaths), "attention: there is no path ",
                wanted);
    path = kernels::kAttentionPaths[wanted];
    const std::string reason = kernels::why_not(p, *path);
    TORCH_CHECK(reason.empty(), "attention: ", std::string(name(*path)), " cannot run: ", reason);
  } else {
    path = kernels::choose_path(p, density);
    TORCH_CHECK(path.has_value(), "attention on ", q.device(), ": ",
                kernels::why_not(p, AttentionPath::kCudaPosition), "; got ", q.scalar_type(),
                ", head size ", p.head_dim, ", ", p.q_heads, " query and ", p.kv_heads,
                " KV heads");
  }
  const auto bytes = static_cast<int64_t>(kernels::workspace_bytes(p, *path));
  const Tensor workspace = at::empty({bytes}, q.options().dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  kernels::run(p, *path, current_stream(q.device()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_cuda(const Tensor& q_in, const Tensor& k_in,
                                                  const Tensor& v_in, const Tensor& last_in,
                                                  const OptionalTensor& lengths_in, double scale,
                                                  bool want_mass, const OptionalTensor& order_in,
                                                  const OptionalTensor& ends_in, int64_t reach,
                                                  double density, int64_t path) {
  check_attention(q_in, k_in, v_in, last_in, lengths_in, scale);
  check_order(order_in, ends_in, reach, q_in, k_in);
  const c10::DeviceGuard guard(q_in.device());
  const Tensor q = kernel_rows(q_in), k = kernel_rows(k_in), v = kernel_rows(v_in),
               last = last_in.contiguous(), lengths = contiguous_or_none(lengths_in),
               order = contiguous_or_none(order_in), ends = contiguous_or_none(ends_in);
  ForwardCall call(q, k, v, last, lengths, scale, want_mass);
  kernels::AttentionForward& p = call.params;
  tidy(p.q_stride, q);
  tidy(p.k_stride, k);
  tidy(p.v_stride, v);
  p.sorted = key_order(order, ends, reach);
  run(p, density, path, q);
  return {call.out.narrow(3, 0, q_in.size(3)), call.lse, call.mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const Tensor& last_in,
    const OptionalTensor& lengths_in, double scale, const OptionalTensor& horizons_in,
    const OptionalTensor& role_lse_in, bool limit_factor, const OptionalTensor& order_in,
    const OptionalTensor& ends_in, int64_t reach, double density, int64_t path) {
  check_attention(q_in, k_in, v_in, last_in, lengths_in, scale);
  check_attention_backward(dout_in, q_in, k_in, horizons_in);
  check_order(order_in, ends_in, reach, q_in, k_in);
  const c10::DeviceGuard guard(q_in.device());
  const Tensor q = kernel_rows(q_in), k = kernel_rows(k_in), v = kernel_rows(v_in),
               out = kernel_rows(out_in), dout = kernel_rows(dout_in), lse = lse_in.contiguous(),
               last = last_in.contiguous(), lengths = contiguous_or_none(lengths_in),
               horizons = contiguous_or_none(horizons_in),
               role_lse = contiguous_or_none(role_lse_in), order = contiguous_or_none(order_in),
               ends = contiguous_or_none(ends_in);
  BackwardCall call(dout, q, k, v, out, lse, last, lengths, scale, horizons, role_lse,
                    limit_factor);
  kernels::AttentionBackward& p = call.params;
  tidy(p.q_stride, q);
  tidy(p.k_stride, k);
  tidy(p.v_stride, v);
  tidy(p.out_stride, out);
  tidy(p.dout_stride, dout);
  p.sorted = key_order(order, ends, reach);
  run(p, density, path, q);
  const int64_t head_dim = q_in.size(3);
  return {call.dq.narrow(3, 0, head_dim), call.dk.narrow(3, 0, head_dim),
          call.dv.narrow(3, 0, head_dim), call.role_sums};
}

}  // namespace natslm::ops
