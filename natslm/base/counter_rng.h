// Counter-based random numbers: a pure function of a key and a counter, so that any batching,
// sharding, device or resumed run draws the same values. Philox-4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

#include "natslm/base/lifetime.h"

namespace natslm {

// Four independent 32-bit words for one (key, counter) pair.
NATSLM_HD constexpr std::array<uint32_t, 4> philox(std::array<uint32_t, 2> key,
                                                   std::array<uint32_t, 4> counter) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

// Spreads a 64-bit number (SplitMix64's finalizer, Steele et al. 2014): for mixing ids into a key.
NATSLM_HD constexpr uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// A word as a float in the open interval (0, 1): never 0, so that its logarithm is finite.
NATSLM_HD constexpr float open_unit(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * (1.0f / 8388608.0f);
}

}  // namespace natslm
