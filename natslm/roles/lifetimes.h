// Roles -> lifetimes of one (sequence, KV head), what those lifetimes cost, and the order of the
// keys in which a query reads them in few runs.
//
// With role chunks (c > 1) only complete chunks have a role; the tokens after the last complete one
// are readable for ever and end no Local. The first chunk is Global whatever its entry says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/roles/gumbel.h"
#include "natslm/roles/roles.h"

namespace natslm::roles {

// One (sequence, head); each span [length]. `horizon[t]` is the lifetime under role t, whatever
// role was given; empty spans are not wanted.
struct LifetimeRows {
  std::span<int32_t> last;
  std::span<int32_t> horizon[kRoles];
};

// roles: one per complete chunk, length / options.chunk of them.
void write_lifetimes(std::span<const int8_t> roles, int32_t length, const Options& options,
                     const LifetimeRows& out);

// Last reader of a Sliding token whose chunk ends at `final`; for ever, too, if the sum is no
// position.
NATSLM_HD constexpr int32_t window_end(int32_t final, int32_t window) {
  const int64_t sum = int64_t{final} + window;
  return sum > kMaxPosition ? kForever : static_cast<int32_t>(sum);
}

// The segments of kernels::KeyOrder: what lives for ever; Locals that outlive the window; window
// tokens together with the Locals that live no longer, which cost no more there and save runs.
NATSLM_HD constexpr int32_t key_reach(const Options& options) {
  const int64_t reach = int64_t{options.window} + options.chunk - 1;
  return reach > kMaxPosition ? kMaxPosition : static_cast<int32_t>(reach);
}
NATSLM_HD constexpr int key_segment(int32_t position, int32_t last, int32_t reach) {
  return last == kForever ? 0 : last - position > reach ? 1 : 2;
}

// last [length] as write_lifetimes wrote it -> order [length], ends [KeyOrder::kSegments].
void write_key_order(std::span<const int32_t> last, int32_t reach, std::span<int32_t> order,
                     std::span<int32_t> ends);

// The shares of method.md, "Price of memory", for one (sequence, head).
struct KeyShares {
  double pairs = 1;    // of the causal (query, key) pairs
  double kv_end = 1;   // of the keys, at the last token's own query
  double kv_mean = 1;  // of the keys so far, mean over the queries
};

// last [T], every last[j] >= j. `harmonic[n]` = 1 + 1/2 + ... + 1/n for n = 0 .. T. All 1 if T is
// 0.
KeyShares key_shares(std::span<const int32_t> last, std::span<const double> harmonic);

// Fills harmonic[n] for n = 0 .. size - 1.
void write_harmonic(std::span<double> harmonic);

// 1 + 1/2 + ... + 1/n within 5e-8 (for n below 2^24, which a float holds), half of that in a mean
// over many n: three double operations in place of some hundred.
NATSLM_HD inline double harmonic_estimate(int32_t n) {
  constexpr double kEuler = 0.57721566490153286, kLn2 = 0.69314718055994531;
  constexpr int32_t kFew = 16, kCommon = 360360;  // the least common multiple of 1 .. 15
  if (n < kFew) {
    int32_t sum = 0;
    for (int32_t i = 1; i < kFew; ++i) sum += i <= n ? kCommon / i : 0;
    return sum * (1.0 / kCommon);
  }
  const SplitLog log = split_log(static_cast<float>(n));
  const float x = 1.0f / static_cast<float>(n), z = x * x;
  const float rest = 0.5f * x - z * (1.0f / 12 - z * (1.0f / 120));
  return log.exponent * kLn2 + kEuler + static_cast<double>(log.log_m + rest);
}

// The same without a table, within 2e-12.
NATSLM_HD inline double harmonic_number(int32_t n) {
  constexpr double kEuler = 0.57721566490153286;
  if (n < 16) {
    double sum = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int32_t i = n; i > 0; --i) sum += 1.0 / i;
    return sum;
  }
  // Euler-Maclaurin; the first term left out is 1 / (240 n^8).
  const double x = 1.0 / n, z = x * x;
  return std::log(static_cast<double>(n)) + kEuler + x / 2 -
         z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252)));
}

}  // namespace natslm::roles
