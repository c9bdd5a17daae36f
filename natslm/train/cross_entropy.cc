// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/cross_entropy.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/sum.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/ops/parallel.h"

namespace natslm::train {

namespace {

// Rows are worked on in blocks that stay in the core's own cache through all passes over them.
constexpr int64_t kBlockElements = 64 * 1024;

// One block: x [n, V] float becomes exp(x - row maximum); target [n, 1]. Returns each row's sum [n,
// 1] and adds the loss to `loss`.
at::Tensor exponentials(const at::Tensor& x, const at::Tensor& target, double& loss) {
  x.sub_(x.amax(1, /*keepdim=*/true));
  const at::Tensor chosen = x.gather(1, target);
  x.exp_();
  at::Tensor sums = x.sum(1, /*keepdim=*/true);
  loss += sums.log().sub_(chosen).sum(at::kDouble).item<double>();
  return sums;
}

template <class Block>
double over_blocks(const at::Tensor& logits, const at::Tensor& targets, const Block& block) {
  const int64_t vocabulary = logits.size(-1);
  const at::Tensor x = logits.detach().view({-1, vocabulary});
  const at::Tensor target = targets.reshape({-1, 1});
  NATSLM_CHECK(target.size(0) == x.size(0), "there are ", target.size(0), " targets for ",
               x.size(0), " rows of logits; the numbers must be equal");
  if (x.size(0) == 0) return 0;
  const int64_t lowest = target.min().item<int64_t>(), highest = target.max().item<int64_t>();
  NATSLM_CHECK(lowest >= 0 && highest < vocabulary, "token id ", lowest < 0 ? lowest : highest,
               " is outside the vocabulary of ", vocabulary,
               "; the text was packed with another tokenizer");
  const int64_t rows = std::max<int64_t>(1, kBlockElements / vocabulary);
  const int64_t blocks = (x.size(0) + rows - 1) / rows;
  // A sum a block, added up in order: the same for any number of threads.
  std::vector<double> losses(static_cast<size_t>(blocks));
  ops::torch_threads()(blocks, [&](int64_t b, int) {
    const c10::NoGradGuard no_grad;
    const int64_t first = b * rows, count = std::min(rows, x.size(0) - first);
    block(x.narrow(0, first, count), target.narrow(0, first, count),
          losses[static_cast<size_t>(b)]);
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum;
}

}  // namespace

double cross_entropy_to_gradient(const at::Tensor& logits, const at::Tensor& targets,
                                 double weight) {
  NATSLM_ASSERT(logits.is_contiguous());
  const double sum = over_blocks(
      logits, targets, [&](const at::Tensor& rows, const at::Tensor& target, double& loss) {
        const at::Tensor x = rows.to(at::kFloat);  // the rows themselves if they are float already
        const at::Tensor sums = exponentials(x, target, loss);
        x.mul_(sums.reciprocal_().mul_(weight));
        x.scatter_(1, target, x.gather(1, target).sub_(weight));
        if (!x.is_same(rows)) rows.copy_(x);
      });
  logits.unsafeGetTensorImpl()->bump_version();
  return sum;
}

double cross_entropy(const at::Tensor& logits, const at::Tensor& targets) {
  return over_blocks(logits.contiguous(), targets,
                     [](const at::Tensor& rows, const at::Tensor& target, double& loss) {
                       exponentials(rows.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true),
                                    target, loss);
                     });
}

}  // namespace natslm::train
