// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/finetune_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "natslm/base/error.h"
#include "natslm/ops/training_kernels.h"
#include "natslm/train/finetune_options.h"

namespace natslm::train {
namespace {

using at::Tensor;

// Logits in memory at a time: few enough not to matter beside a model, enough for full products.
constexpr int64_t kLogits = int64_t{1} << 27, kLogitsOnCpu = int64_t{1} << 25;

// Logits of the rows as a function of them, so that their gradient can go back to the rows.
struct Rows {
  Tensor hidden, logits;
};
Rows logits_of(const models::Model& model, const Tensor& hidden) {
  const c10::AutoGradMode gradient(true);
  const Tensor leaf = hidden.detach().requires_grad_(true);
  return {leaf, model.output(leaf)};
}

// Weighted losses of some rows, summed, and the gradient at the logits.
struct LogitsLoss {
  Tensor loss, gradient;
};
LogitsLoss logits_loss(const std::string& kind, const Tensor& logits, const Tensor& dense_logits,
                       const Tensor& targets, const Tensor& weights) {
  const Tensor log_p = at::log_softmax(logits, -1, at::kFloat);
  const Tensor column = targets.unsqueeze(-1);
  Tensor loss = at::zeros({targets.size(0)}, log_p.options());
  Tensor gradient = log_p.exp();
  double of_p = 0;  // how often the model's own probabilities stand in the gradient
  Tensor minus = at::zeros_like(gradient);
  if (kind == kCrossEntropy || kind == kBothLosses) {
    loss -= log_p.gather(-1, column).squeeze(-1);
    minus.scatter_add_(-1, column, at::zeros_like(column, log_p.options()) + 1);
    ++of_p;
  }
  if (kind == kToDense || kind == kBothLosses) {
    const Tensor log_dense = at::log_softmax(dense_logits, -1, at::kFloat);
    const Tensor dense = log_dense.exp();
    loss += (dense * (log_dense - log_p)).sum(-1);
    minus += dense;
    ++of_p;
  }
  gradient.mul_(of_p).sub_(minus).mul_(weights.unsqueeze(-1));
  return {(loss * weights).sum(at::kDouble), gradient};
}

// Whether cross-entropy and its gradient are one kernel over the logits of this output matrix.
bool has_fused_loss(const Tensor& matrix) {
  return matrix.defined() && !matrix.is_cpu() && matrix.scalar_type() == at::kBFloat16 &&
         matrix.size(0) % 8 == 0;
}

}  // namespace

RowsLoss rows_loss(const models::Model& model, const std::string& kind, const Tensor& hidden,
                   const Tensor& teacher, const Tensor& targets, const Tensor& weights) {
  const c10::NoGradGuard no_grad;
  const int64_t width = hidden.size(-1);
  const Tensor all = hidden.detach().reshape({-1, width});
  const Tensor weight = weights.reshape({-1}), target = targets.reshape({-1});
  const Tensor counted = at::nonzero(weight).squeeze(-1);
  const int64_t n = counted.size(0);
  RowsLoss result;
  result.loss = at::zeros({}, hidden.options().dtype(at::kDouble).requires_grad(false));
  Tensor gradient = at::zeros_like(all, all.options().dtype(at::kFloat));
  const bool imitates = kind != kCrossEntropy;
  NATSLM_ASSERT(!imitates || teacher.defined());
  const Tensor dense_all = imitates ? teacher.reshape({-1, width}) : Tensor();

  const Tensor matrix = model.output_matrix();
  const int64_t logits = all.is_cpu() ? kLogitsOnCpu : kLogits;
  const int64_t portion = std::max<int64_t>(16, logits / std::max(1, model.config().vocabulary));
  for (int64_t begin = 0; begin < n; begin += portion) {
    const Tensor rows = counted.narrow(0, begin, std::min(portion, n - begin));
    const Tensor h = all.index_select(0, rows), w = weight.index_select(0, rows);
    const Tensor dense = imitates ? dense_all.index_select(0, rows) : Tensor();
    if (kind == kHiddenError) {
      const Tensor error = h.to(at::kFloat) - dense.to(at::kFloat);
      result.loss += (error.square().mean(-1) * w).sum(at::kDouble);
      gradient.index_copy_(0, rows, error * (w * (2.0 / static_cast<double>(width))).unsqueeze(-1));
      continue;
    }
    if (kind == kCrossEntropy && has_fused_loss(matrix)) {
      const Tensor logit_rows = at::mm(h.to(matrix.scalar_type()), matrix.t());
      const Tensor losses = ops::cross_entropy_rows_(
          logit_rows, target.index_select(0, rows).to(at::kInt), matrix.size(0), true, 1, w);
      result.loss += (losses * w).sum(at::kDouble);
      gradient.index_copy_(0, rows, at::mm(logit_rows, matrix).to(at::kFloat));
      continue;
    }
    const Rows forward = logits_of(model, h);
    const LogitsLoss of_rows =
        logits_loss(kind, forward.logits, imitates ? model.output(dense) : Tensor(),
                    target.index_select(0, rows), w);
    torch::autograd::backward({forward.logits}, {of_rows.gradient.to(forward.logits.dtype())});
    result.loss += of_rows.loss;
    gradient.index_copy_(0, rows, forward.hidden.grad().to(at::kFloat));
  }
  result.gradient = gradient.view(hidden.sizes());
  return result;
}

}  // namespace natslm::train
