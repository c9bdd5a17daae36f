// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/library_attention.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <vector>

#include "natslm/kernels/gpu_head_dim.h"

namespace natslm::ops {
namespace {

using at::Tensor;
using kernels::AttentionPath;

// While it lives, LibTorch tries cuDNN first: on an H200 it took 0.6 times FlashAttention-2's time,
// which is what LibTorch 2.11 takes by itself. Kernels that were switched off stay so.
class CudnnFirst {
 public:
  CudnnFirst() : before_(at::globalContext().sDPPriorityOrder()) {
    using enum at::SDPBackend;
    set(std::vector{cudnn_attention, flash_attention, efficient_attention, math, overrideable});
  }
  ~CudnnFirst() { set(before_); }
  CudnnFirst(const CudnnFirst&) = delete;
  CudnnFirst& operator=(const CudnnFirst&) = delete;

 private:
  template <class Order>
  static void set(const Order& order) {
    std::vector<int64_t> numbers;
    for (const at::SDPBackend backend : order) numbers.push_back(static_cast<int64_t>(backend));
    at::globalContext().setSDPPriorityOrder(numbers);
  }
  decltype(at::globalContext().sDPPriorityOrder()) before_;
};

bool wants_gradient(const Tensor& q, const Tensor& k) {
  return at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad());
}

}  // namespace

bool library_serves(const Tensor& q, const Tensor& k, const std::optional<Tensor>& lengths,
                    const AttentionHints& hints) {
  if (!q.is_cuda()) return false;
  if (hints.forward_path) return *hints.forward_path == AttentionPath::kLibrary;
  const int32_t head_dim = kernels::gpu_head_dim(static_cast<int32_t>(q.size(3)));
  const auto p = kernels::shape_only<kernels::AttentionForward>(
      static_cast<int32_t>(q.size(0)), static_cast<int32_t>(q.size(1)),
      static_cast<int32_t>(k.size(1)), static_cast<int32_t>(q.size(2)), head_dim, false);
  const auto usable = [&](AttentionPath path) {
    if (path == AttentionPath::kLibrary) return true;
    return q.scalar_type() == at::kBFloat16 && kernels::why_not(p, path).empty();
  };
  if (lengths) return !usable(AttentionPath::kCudaPosition);
  const kernels::AttentionShape shape = {.head_dim = head_dim,
                                         .group = p.q_heads / p.kv_heads,
                                         .tokens = p.tokens,
                                         .rows = kernels::rows_of(p)};
  return kernels::takes_library(shape, wants_gradient(q, k), usable);
}

Tensor library_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& lengths, double scale) {
  const CudnnFirst order;
  const Tensor out = at::scaled_dot_product_attention(q, k, v, {}, /*dropout_p=*/0.0,
                                                      /*is_causal=*/true, scale,
                                                      /*enable_gqa=*/q.size(1) != k.size(1));
  if (!lengths) return out;
  const Tensor past = at::arange(q.size(2), lengths->options()).ge(lengths->unsqueeze(1));
  return out.masked_fill(past.unsqueeze(1).unsqueeze(3), 0);
}

}  // namespace natslm::ops
