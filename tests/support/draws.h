// Numbers from a seed, one after the other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/base/counter_rng.h"

namespace natslm::test {

class Draws {
 public:
  // Other streams of the same seed are other numbers.
  Draws(uint32_t seed, uint32_t stream) : seed_(seed), stream_(stream) {}
  uint32_t word() { return philox({seed_, stream_}, {count_++, 0, 0, 0})[0]; }
  int32_t below(int32_t n) { return static_cast<int32_t>(word() % static_cast<uint32_t>(n)); }
  bool coin() { return word() & 1; }
  float uniform(float range) { return (2 * open_unit(word()) - 1) * range; }

 private:
  uint32_t seed_, stream_, count_ = 0;
};

}  // namespace natslm::test
