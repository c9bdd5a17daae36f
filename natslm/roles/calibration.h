// What a budget bias keeps: measured once for a model and its roles, on texts that were not trained
// on, and stored with them. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace natslm::roles {

struct Calibration {
  std::vector<float> bias;          // added to the Sliding logits, ascending; at least one
  std::vector<float> kv_end;        // KV at end measured with each, in (0, 1], never ascending
  std::vector<float> layer_shares;  // of all live keys, by layer; empty: not measured

  // The bias at which the share `kv` of the keys is alive at the end: piecewise linear between the
  // measured points, the nearest one's beyond them. Never ascends with `kv`.
  float bias_for(double kv) const;
};

// Throws Error for a table that is empty, not in order or not of numbers, and unless the layer
// shares are empty or `layers` numbers of at least 0 that are not all 0.
void check(const Calibration& calibration, int32_t layers);

}  // namespace natslm::roles
