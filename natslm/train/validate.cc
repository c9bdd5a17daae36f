// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/validate.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"
#include "natslm/train/cross_entropy.h"

namespace natslm::train {

Validation validate(models::Model& model, const data::TokenDataset& dataset, int64_t context,
                    int64_t batch, int64_t windows) {
  const c10::NoGradGuard no_grad;
  const int64_t available = dataset.windows(context);
  NATSLM_CHECK(available > 0, "the validation text has ", dataset.tokens(),
               " tokens, fewer than one window of ", context + 1, "; give more");
  const int64_t count = windows > 0 ? std::min(windows, available) : available;
  double loss = 0;
  Validation result;
  result.shares = {0, 0, 0};
  for (int64_t first = 0; first < count; first += batch) {
    const int64_t rows = std::min(batch, count - first);
    const at::Tensor ids = at::empty({rows, context + 1}, at::kInt);
    for (int64_t r = 0; r < rows; ++r)
      dataset.window((first + r) * available / count, context,
                     ids.mutable_data_ptr<int32_t>() + r * (context + 1));
    const at::Tensor tokens = ids.to(at::kLong);
    models::TrainingInput input;
    input.tokens = tokens.slice(1, 0, context).contiguous();
    input.sample = false;
    const models::TrainingOutput output = model.forward(input);
    loss += cross_entropy(output.logits, tokens.slice(1, 1));
    const double share = static_cast<double>(rows) / static_cast<double>(count);
    result.shares.pairs += share * output.sampled.pairs;
    result.shares.kv_end += share * output.sampled.kv_end;
    result.shares.kv_mean += share * output.sampled.kv_mean;
  }
  result.perplexity = std::exp(loss / static_cast<double>(count * context));
  return result;
}

}  // namespace natslm::train
