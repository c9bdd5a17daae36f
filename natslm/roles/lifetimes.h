// Roles -> lifetimes of one (sequence, KV head), and what those lifetimes cost.
//
// With role chunks (c > 1) only complete chunks have a role; the tokens after the last complete one
// are readable for ever and end no Local. The first chunk is Global whatever its entry says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

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

}  // namespace natslm::roles
