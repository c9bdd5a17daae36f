// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "natslm/base/error.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {

std::string_view why_not(const CrossEntropy& p) {
  if (p.rows < 0) return "rows must not be negative";
  if (p.vocabulary < 1) return "vocabulary must be positive";
  if (p.columns < p.vocabulary) return "columns must be at least the vocabulary";
  return "";
}

void run(const CrossEntropy& p) {
  NATSLM_CHECK(why_not(p).empty(), "cross entropy (reference): ", why_not(p));
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t first = r * p.columns;
    const int32_t target = p.targets[r];
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int32_t v = 0; v < p.vocabulary; ++v)
      top = std::max(top, load(p.logits, p.dtype, first + v));
    for (int32_t v = 0; v < p.vocabulary; ++v)
      sum += std::exp(load(p.logits, p.dtype, first + v) - top);
    const bool inside = target >= 0 && target < p.vocabulary;
    p.loss[r] =
        inside ? static_cast<float>(top + std::log(sum) - load(p.logits, p.dtype, first + target))
               : std::numeric_limits<float>::quiet_NaN();
    if (!p.gradient) continue;
    const double weight = p.weights ? double{p.weight} * p.weights[r] : p.weight;
    for (int32_t v = 0; v < p.vocabulary; ++v) {
      const double softmax = std::exp(load(p.logits, p.dtype, first + v) - top) / sum;
      store(p.logits, p.dtype, first + v, weight * (softmax - (v == target ? 1 : 0)));
    }
    for (int32_t v = p.vocabulary; v < p.columns; ++v) store(p.logits, p.dtype, first + v, 0);
  }
}

}  // namespace natslm::kernels::reference
