// What one optimiser step consists of: parts of the batch one after the other, and what each part's
// gradient is for. Pure functions of the options, the same on every device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "natslm/train/options.h"

namespace natslm::train {

// Sequences [first, first + count) of a step's batch.
struct Part {
  int64_t first = 0, count = 0;
  bool weights = true, scores = true;  // whose gradient they give
  double loss_weight = 0;              // of the sum of the losses of their tokens
  double price_share = 0;              // their price is weighted with lambda times this
  bool accumulate = false;             // a part before gave a gradient of the same kind
};

// --optimize joint: every part gives all gradients. alternating: the first half of the batch gives
// those of the weights, with roles drawn but fixed, the second half those of the score layers; each
// is a mean over its own half.
std::vector<Part> parts_of(const Options& options);

// The budget bias of one sequence at one step, from U(-range, range).
float drawn_bias(uint64_t seed, int64_t step, int64_t sequence, double range);

}  // namespace natslm::train
