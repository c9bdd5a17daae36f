// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/calibration.h"

#include <cmath>
#include <cstddef>

#include "natslm/base/error.h"

namespace natslm::roles {

float Calibration::bias_for(double kv) const {
  NATSLM_CHECK(!bias.empty() && bias.size() == kv_end.size(), "calibration: ", bias.size(),
               " biases and ", kv_end.size(), " shares are no table: measure one share a bias");
  if (kv >= kv_end.front()) return bias.front();
  // The first point that keeps no more than `kv`; the one before it keeps more, so that no step is
  // divided by 0.
  size_t i = 1;
  while (i < kv_end.size() && kv_end[i] > kv) ++i;
  if (i == kv_end.size()) return bias.back();
  const double part = (kv_end[i - 1] - kv) / (double{kv_end[i - 1]} - kv_end[i]);
  return static_cast<float>(bias[i - 1] + part * (double{bias[i]} - bias[i - 1]));
}

void check(const Calibration& calibration, int32_t layers) {
  const auto& [bias, kv_end, layer_shares] = calibration;
  NATSLM_CHECK(!bias.empty() && bias.size() == kv_end.size(), "calibration: ", bias.size(),
               " biases and ", kv_end.size(), " shares are no table: measure one share a bias");
  for (size_t i = 0; i < bias.size(); ++i) {
    NATSLM_CHECK(std::isfinite(bias[i]) && (i == 0 || bias[i] > bias[i - 1]), "calibration: bias ",
                 bias[i], " at place ", i, " is not a number above the one before it");
    NATSLM_CHECK(kv_end[i] > 0 && kv_end[i] <= 1 && (i == 0 || kv_end[i] <= kv_end[i - 1]),
                 "calibration: KV at end ", kv_end[i], " at place ", i,
                 " is not a share in (0, 1] that is no larger than the one before it");
  }
  if (layer_shares.empty()) return;
  NATSLM_CHECK(std::ssize(layer_shares) == layers, "calibration: ", layer_shares.size(),
               " layer shares do not fit a model of ", layers, " layers");
  double sum = 0;
  for (const float share : layer_shares) {
    NATSLM_CHECK(std::isfinite(share) && share >= 0, "calibration: a layer's share of the keys is ",
                 share, "; it must be 0 or more");
    sum += share;
  }
  NATSLM_CHECK(sum > 0, "calibration: the layers' shares of the keys are all 0; one must be more");
}

}  // namespace natslm::roles
