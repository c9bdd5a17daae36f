// Picks the next token from a row of logits. A pure function of (logits, settings, position): the
// random number is drawn from a counter, so a sequence's tokens do not depend on what else is in
// the batch. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

namespace natslm::engine {

struct Sampling {
  float temperature =
      0.0f;            // 0 always takes the best token; 1 samples from the model's own distribution
  int32_t top_k = 0;   // only the k best tokens; 0: all of them
  float top_p = 1.0f;  // only the fewest best tokens that together have this probability; 1: all
  uint64_t seed = 1;
};

// Throws Error naming the setting that is out of range.
void check(const Sampling& sampling);

// The token at `position` of its sequence, given its logits [vocabulary]. Equal logits: the lower
// id wins. Throws Error if there is no finite logit to choose from.
int32_t sample(std::span<const float> logits, const Sampling& sampling, int64_t position);

}  // namespace natslm::engine
