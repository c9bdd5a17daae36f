// Turning and splitting the heads is one pass over the projection on the CPU in float32 (as single
// tensor operations it cost 6 of them and as many copies), and on a GPU in bf16, where the heads
// stay in the projection; anything else takes the tensor operations, which autograd differentiates
// by itself.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/rotary.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"
#include "natslm/ops/fused_layers.h"
#include "natslm/ops/parallel.h"

namespace natslm::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x [..., D] with cos and sin broadcast over it.
Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t half = x.size(-1) / 2;
  const Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
  return at::cat({a * cos - b * sin, b * cos + a * sin}, -1);
}

Heads split_with_tensor_operations(const Tensor& fused, int64_t q_heads, int64_t kv_heads,
                                   int64_t d, const Tensor& cos, const Tensor& sin) {
  const int64_t b = fused.size(0), t = fused.size(1);
  const auto part = [&](int64_t first, int64_t heads) {
    return fused.narrow(2, first * d, heads * d).view({b, t, heads, d}).transpose(1, 2);
  };
  const int64_t used = (q_heads + 2 * kv_heads) * d;
  const Tensor c = cos.narrow(0, 0, t).to(fused.options()),
               s = sin.narrow(0, 0, t).to(fused.options());
  return {.q = turned(part(0, q_heads), c, s).contiguous(),
          .k = turned(part(q_heads, kv_heads), c, s).contiguous(),
          .v = part(q_heads + kv_heads, kv_heads).contiguous(),
          .rest = fused.narrow(2, used, fused.size(2) - used)};
}

// One head's vector to or from its place in the projection. `sin_sign` -1 turns back.
void turn(const float* from, float* to, const float* cos, const float* sin, float sin_sign,
          int64_t half) {
  for (int64_t c = 0; c < half; ++c) {
    const float a = from[c], b = from[c + half], s = sin_sign * sin[c];
    to[c] = a * cos[c] - b * s;
    to[c + half] = b * cos[c] + a * s;
  }
}

// Where the pieces of one projection lie, for the pass forward and the one back.
struct Layout {
  int64_t batch, tokens, q_heads, kv_heads, d, columns;
  const float *cos, *sin;
  int64_t rest() const { return columns - (q_heads + 2 * kv_heads) * d; }
};

// Calls body(b, t) for all rows, from several threads.
template <class Body>
void for_rows(const Layout& l, const Body& body) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (l.tokens + kBlock - 1) / kBlock;
  // One block is done before another thread is awake.
  const ParallelFor parallel = l.batch * blocks == 1 ? serial() : ops::torch_threads();
  parallel(l.batch * blocks, [&](int64_t task, int) {
    const int64_t begin = task % blocks * kBlock, end = std::min(begin + kBlock, l.tokens);
    for (int64_t t = begin; t < end; ++t) body(task / blocks, t);
  });
}

class SplitHeads : public torch::autograd::Function<SplitHeads> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& fused_in, int64_t q_heads,
                               int64_t kv_heads, const Tensor& cos, const Tensor& sin) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor fused = fused_in.contiguous();
    const int64_t d = cos.size(1) * 2;
    const Layout l{fused.size(0),
                   fused.size(1),
                   q_heads,
                   kv_heads,
                   d,
                   fused.size(2),
                   cos.const_data_ptr<float>(),
                   sin.const_data_ptr<float>()};
    const auto options = fused.options().requires_grad(false);
    Tensor q = at::empty({l.batch, q_heads, l.tokens, d}, options);
    Tensor k = at::empty({l.batch, kv_heads, l.tokens, d}, options);
    Tensor v = at::empty({l.batch, kv_heads, l.tokens, d}, options);
    Tensor rest = at::empty({l.batch, l.tokens, l.rest()}, options);
    const float* source = fused.const_data_ptr<float>();
    float *qp = q.mutable_data_ptr<float>(), *kp = k.mutable_data_ptr<float>(),
          *vp = v.mutable_data_ptr<float>(), *rp = rest.mutable_data_ptr<float>();
    for_rows(l, [&](int64_t b, int64_t t) {
      const float* from = source + (b * l.tokens + t) * l.columns;
      const float *c = l.cos + t * d / 2, *s = l.sin + t * d / 2;
      for (int64_t h = 0; h < q_heads; ++h, from += d) {
        turn(from, qp + ((b * q_heads + h) * l.tokens + t) * d, c, s, 1, d / 2);
      }
      for (int64_t h = 0; h < kv_heads; ++h, from += d) {
        turn(from, kp + ((b * kv_heads + h) * l.tokens + t) * d, c, s, 1, d / 2);
      }
      for (int64_t h = 0; h < kv_heads; ++h, from += d) {
        std::copy(from, from + d, vp + ((b * kv_heads + h) * l.tokens + t) * d);
      }
      std::copy(from, from + l.rest(), rp + (b * l.tokens + t) * l.rest());
    });
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["columns"] = l.columns;
    return {q, k, v, rest};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor dq = grads[0].contiguous(), dk = grads[1].contiguous(), dv = grads[2].contiguous(),
                 drest = grads[3].contiguous();
    const int64_t d = dq.size(3), q_heads = dq.size(1), kv_heads = dk.size(1);
    const Layout l{dq.size(0),
                   dq.size(2),
                   q_heads,
                   kv_heads,
                   d,
                   ctx->saved_data["columns"].toInt(),
                   saved[0].const_data_ptr<float>(),
                   saved[1].const_data_ptr<float>()};
    Tensor dfused = at::empty({l.batch, l.tokens, l.columns}, dq.options());
    float* target = dfused.mutable_data_ptr<float>();
    const float *qp = dq.const_data_ptr<float>(), *kp = dk.const_data_ptr<float>(),
                *vp = dv.const_data_ptr<float>(), *rp = drest.const_data_ptr<float>();
    for_rows(l, [&](int64_t b, int64_t t) {
      float* to = target + (b * l.tokens + t) * l.columns;
      const float *c = l.cos + t * d / 2, *s = l.sin + t * d / 2;
      for (int64_t h = 0; h < q_heads; ++h, to += d) {
        turn(qp + ((b * q_heads + h) * l.tokens + t) * d, to, c, s, -1, d / 2);
      }
      for (int64_t h = 0; h < kv_heads; ++h, to += d) {
        turn(kp + ((b * kv_heads + h) * l.tokens + t) * d, to, c, s, -1, d / 2);
      }
      for (int64_t h = 0; h < kv_heads; ++h, to += d) {
        const float* from = vp + ((b * kv_heads + h) * l.tokens + t) * d;
        std::copy(from, from + d, to);
      }
      const float* from = rp + (b * l.tokens + t) * l.rest();
      std::copy(from, from + l.rest(), to);
    });
    return {dfused, {}, {}, {}, {}};
  }
};

}  // namespace

Rotary::Rotary(int32_t head_dim, double base, int32_t context)
    : head_dim_(head_dim), context_(context) {
  const int64_t half = head_dim / 2;
  cos_ = at::empty({context, half}, at::kFloat);
  sin_ = at::empty({context, half}, at::kFloat);
  float *cos = cos_.mutable_data_ptr<float>(), *sin = sin_.mutable_data_ptr<float>();
  for (int64_t c = 0; c < half; ++c) {
    const double frequency = std::pow(base, -2.0 * static_cast<double>(c) / head_dim);
    for (int64_t t = 0; t < context; ++t) {
      const double angle = static_cast<double>(t) * frequency;
      cos[t * half + c] = static_cast<float>(std::cos(angle));
      sin[t * half + c] = static_cast<float>(std::sin(angle));
    }
  }
}

Rotary::Rotary(int32_t head_dim, const RopeFrequencies& frequencies, int32_t context)
    : head_dim_(head_dim), context_(context) {
  const int64_t half = head_dim / 2, turning = std::ssize(frequencies.inverse);
  turns_ = turning > 0;
  NATSLM_CHECK(turning <= half, turning, " frequencies do not fit heads of ", head_dim,
               " channels");
  cos_ = at::empty({context, half}, at::kFloat);
  sin_ = at::empty({context, half}, at::kFloat);
  float *cos = cos_.mutable_data_ptr<float>(), *sin = sin_.mutable_data_ptr<float>();
  ops::torch_threads()(context, [&](int64_t t, int) {
    for (int64_t c = 0; c < half; ++c) {
      const bool turns = c < turning;
      // float32, as rope.h says.
      const float angle = turns ? static_cast<float>(t) * frequencies.inverse[c] : 0.0f;
      const float factor = turns ? frequencies.attention_factor : 1.0f;
      cos[t * half + c] = std::cos(angle) * factor;
      sin[t * half + c] = std::sin(angle) * factor;
    }
  });
}

void Rotary::to(c10::Device device) {
  cos_ = cos_.to(device);
  sin_ = sin_.to(device);
}

Heads Rotary::split_heads(const Tensor& fused, int32_t q_heads, int32_t kv_heads) const {
  NATSLM_CHECK(fused.size(1) <= context_, "a sequence of ", fused.size(1),
               " tokens is longer than the model's context of ", context_, " tokens; shorten it");
  if (fused.is_cpu() && fused.scalar_type() == at::kFloat) {
    const variable_list r =
        SplitHeads::apply(fused, int64_t{q_heads}, int64_t{kv_heads}, cos_, sin_);
    return {.q = r[0], .k = r[1], .v = r[2], .rest = r[3]};
  }
  const bool fits = fused.scalar_type() == at::kBFloat16 && fused.is_contiguous() &&
                    fused.size(2) == (q_heads + 2 * kv_heads) * head_dim_ && head_dim_ % 16 == 0;
  if (!fused.is_cpu() && fits) {
    const ops::TurnedHeads turned = ops::turn_heads(fused, q_heads, kv_heads, cos_, sin_);
    return {.q = turned.q, .k = turned.k, .v = turned.v, .rest = fused.narrow(2, fused.size(2), 0)};
  }
  return split_with_tensor_operations(fused, q_heads, kv_heads, head_dim_, cos_, sin_);
}

Tensor Rotary::rotate(const Tensor& x, const Tensor& positions) const {
  const c10::NoGradGuard no_grad;
  if (positions.numel() == 0) return x;
  if (positions.is_cpu()) {
    const auto highest = positions.max().item<int64_t>();
    NATSLM_CHECK(highest < context_, "position ", highest, " is beyond the model's context of ",
                 context_, " tokens; use a shorter context");
  }
  const Tensor index = positions.to(cos_.device());
  const auto at_positions = [&](const Tensor& table) {
    return table.index_select(0, index).unsqueeze(1).to(x.options());
  };
  return turned(x, at_positions(cos_), at_positions(sin_));
}

}  // namespace natslm::models
