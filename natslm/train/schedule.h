// Learning rate over the steps: linear warm-up, then half a cosine down to a share of the peak.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace natslm::train {

// Factor on the highest rate at `step` (0-based) of `steps`: (step + 1) / warm_up while step <
// warm_up, 1 at step warm_up, and `final_share` at step `steps` (one past the last).
inline double schedule(int64_t step, int64_t steps, int64_t warm_up, double final_share) {
  if (step < warm_up) return static_cast<double>(step + 1) / static_cast<double>(warm_up);
  const double span = static_cast<double>(std::max<int64_t>(steps - warm_up, 1));
  const double done = std::min(static_cast<double>(step - warm_up) / span, 1.0);
  return final_share + (1 - final_share) * 0.5 * (1 + std::cos(std::numbers::pi * done));
}

}  // namespace natslm::train
