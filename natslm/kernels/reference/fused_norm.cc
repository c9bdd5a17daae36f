// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/fused_norm.h"

#include <cmath>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {

std::string_view why_not(const NormForward& p) {
  if (p.rows < 0) return "rows must not be negative";
  if (p.width < 1) return "width must be positive";
  return "";
}

void run(const NormForward& p) {
  NATSLM_CHECK(why_not(p).empty(), "norm (reference): ", why_not(p));
  std::vector<double> sum(p.width);
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t first = r * p.width;
    double total = 0;
    for (int32_t c = 0; c < p.width; ++c) {
      sum[c] = p.x[first + c];
      if (p.branch) {
        // What later passes read is the rounded sum, so that is what is normalised.
        sum[c] = static_cast<float>(sum[c] + load(p.branch, p.dtype, first + c));
        p.sum[first + c] = static_cast<float>(sum[c]);
      }
      total += sum[c];
    }
    const double mean = p.centered ? total / p.width : 0;
    double squares = 0;
    for (const double s : sum) squares += (s - mean) * (s - mean);
    const double rstd = 1 / std::sqrt(squares / p.width + p.epsilon);
    for (int32_t c = 0; c < p.width; ++c)
      store(p.y, p.dtype, first + c, (sum[c] - mean) * rstd * p.weight[c]);
    p.mean[r] = static_cast<float>(mean);
    p.rstd[r] = static_cast<float>(rstd);
  }
}

std::string_view why_not(const NormBackward& p) {
  if (p.rows < 0) return "rows must not be negative";
  if (p.width < 1) return "width must be positive";
  return "";
}

void run(const NormBackward& p) {
  NATSLM_CHECK(why_not(p).empty(), "norm (reference): ", why_not(p));
  std::vector<double> dweight(p.width);
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t first = r * p.width;
    const double rstd = p.rstd[r];
    const auto normed = [&](int32_t c) { return (p.sum[first + c] - p.mean[r]) * rstd; };
    double mean_g = 0, mean_gx = 0;  // of g = weight * dy, of g * normed
    for (int32_t c = 0; c < p.width; ++c) {
      const double dy = load(p.dy, p.dtype, first + c), g = p.weight[c] * dy;
      dweight[c] += dy * normed(c);
      mean_g += g / p.width;
      mean_gx += g * normed(c) / p.width;
    }
    if (!p.centered) mean_g = 0;
    for (int32_t c = 0; c < p.width; ++c) {
      const double g = p.weight[c] * load(p.dy, p.dtype, first + c);
      double dx = rstd * (g - mean_g - normed(c) * mean_gx);
      if (p.dresidual) dx += p.dresidual[first + c];
      p.dx[first + c] = static_cast<float>(dx);
      if (p.dbranch) store(p.dbranch, p.dtype, first + c, dx);
    }
  }
  if (!p.dweight) return;
  for (int32_t c = 0; c < p.width; ++c)
    p.dweight[c] = static_cast<float>(dweight[c] + (p.accumulate ? p.dweight[c] : 0.0f));
}

}  // namespace natslm::kernels::reference
