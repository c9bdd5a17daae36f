// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/step_plan.h"

#include <algorithm>

#include "natslm/base/counter_rng.h"

namespace natslm::train {
namespace {

// Tells these numbers from the noise of the roles, which has the same seed.
constexpr uint64_t kBiasStream = 0x6275646765742062;

void add_parts(int64_t first, int64_t sequences, int64_t micro, int64_t context, bool weights,
               bool scores, std::vector<Part>& parts) {
  for (int64_t begin = 0; begin < sequences; begin += micro) {
    parts.push_back({.first = first + begin,
                     .count = micro,
                     .weights = weights,
                     .scores = scores,
                     .loss_weight = 1.0 / static_cast<double>(sequences * context),
                     .price_share = static_cast<double>(micro) / static_cast<double>(sequences),
                     .accumulate = begin > 0});
  }
}

}  // namespace

std::vector<Part> parts_of(const Options& o) {
  const int64_t micro = o.micro_batch > 0 ? o.micro_batch : o.batch;
  std::vector<Part> parts;
  if (o.optimize == kJoint) {
    add_parts(0, o.batch, micro, o.context, true, true, parts);
  } else {
    const int64_t half = o.batch / 2;
    add_parts(0, half, std::min(micro, half), o.context, true, false, parts);
    add_parts(half, half, std::min(micro, half), o.context, false, true, parts);
  }
  return parts;
}

float drawn_bias(uint64_t seed, int64_t step, int64_t sequence, double range) {
  const uint64_t key = mix64(mix64(mix64(seed ^ kBiasStream) ^ static_cast<uint64_t>(step)) ^
                             static_cast<uint64_t>(sequence));
  const double unit = open_unit(static_cast<uint32_t>(key >> 32));
  return static_cast<float>(range * (2 * unit - 1));
}

}  // namespace natslm::train
