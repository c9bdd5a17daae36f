// Gumbel noise as a pure function of (seed, step, layer, head, sequence, position, role), so that
// any batching, sharding, device or resumed run draws the same roles. Every multiply-add is an
// explicit fma and every other operation is one that IEEE 754 rounds correctly, so a CPU and a GPU
// agree bit for bit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "natslm/base/counter_rng.h"
#include "natslm/roles/roles.h"

namespace natslm::roles {

// A positive normal float is exp(log_m) * 2^exponent, within 2 units in the last place of log_m.
struct SplitLog {
  float exponent;  // a whole number
  float log_m;     // |log_m| <= ln(2) / 2
};

NATSLM_HD inline SplitLog split_log(float x) {
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...)
  // with s = (m - 1) / (m + 1), |s| < 0.172: the first term left out is below 4e-10 of the sum.
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = std::bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23));
  const float f = m - 1.0f;  // exact
  const float s = f / (2.0f + f);
  const float z = s * s;
  float series = std::fma(z, 1.0f / 11.0f, 1.0f / 9.0f);
  series = std::fma(z, series, 1.0f / 7.0f);
  series = std::fma(z, series, 1.0f / 5.0f);
  series = std::fma(z, series, 1.0f / 3.0f);
  return {static_cast<float>(exponent), 2.0f * std::fma(s * z, series, s)};
}

// Natural logarithm of a positive normal float, within 2 units in the last place.
NATSLM_HD inline float natural_log(float x) {
  const SplitLog log = split_log(x);
  // ln 2 in two parts; the product with the first is exact.
  return std::fma(log.exponent, 0.693359375f, std::fma(log.exponent, -2.12194440e-4f, log.log_m));
}

// What the noise of one layer and training step hangs on, apart from head, sequence and position.
struct NoiseKey {
  std::array<uint32_t, 2> words;
};

NATSLM_HD constexpr NoiseKey noise_key(uint64_t seed, int64_t step, int32_t layer) {
  const uint64_t mixed =
      mix64(mix64(mix64(seed) ^ static_cast<uint64_t>(step)) ^ static_cast<uint64_t>(layer));
  return {{static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32)}};
}

// Standard Gumbel noise of the three roles. `head` counts KV heads of the whole model's layer,
// `sequence` is the caller's id of the text, `position` the (first) token's.
NATSLM_HD inline std::array<float, kRoles> gumbel_noise(NoiseKey key, int32_t head,
                                                        int64_t sequence, int32_t position) {
  const std::array<uint32_t, 4> words =
      philox(key.words, {static_cast<uint32_t>(position), static_cast<uint32_t>(head),
                         static_cast<uint32_t>(sequence),
                         static_cast<uint32_t>(static_cast<uint64_t>(sequence) >> 32)});
  std::array<float, kRoles> noise;
  for (int role = 0; role < kRoles; ++role) {
    noise[role] = -natural_log(-natural_log(open_unit(words[role])));
  }
  return noise;
}

}  // namespace natslm::roles
