// The one table of policies: what decides at inference how long a key lives. A new policy is a
// class in its own file and one line in policies.cc (docs/policies.md).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "natslm/cache/kv_cache.h"
#include "natslm/cache/policy.h"
#include "natslm/policies/spec.h"
#include "natslm/roles/calibration.h"
#include "natslm/roles/roles.h"

namespace natslm::policies {

// What a policy may need to know of the model and the run besides its own options.
struct PolicyContext {
  cache::Shape shape;
  roles::Options roles;       // how the model's score layers were trained; set dense: it has none
  float bias = 0;             // budget bias unless the spec gives one
  int32_t context = 0;        // tokens a sequence may have; what ratios refer to. 0: unknown
  uint64_t seed = 0;          // of policies that draw
  bool record_roles = false;  // keep every token's role for Learned::role_of()
  // What the biases of the model's roles keep; null: not measured. Learned roles with a budget and
  // no bias in the spec take theirs from it, and it says what each layer needs.
  const roles::Calibration* calibration = nullptr;
};

struct Entry {
  std::string_view name;
  std::string_view summary;
  std::span<const OptionDoc> options;
  // `spec` has this entry's name and only its options.
  std::unique_ptr<cache::Policy> (*make)(const Spec& spec, const PolicyContext& context);
};

std::span<const Entry> table();

// Throws Error: an unknown policy or option (listing what is allowed), a value out of range, a
// policy that this model or context cannot have.
std::unique_ptr<cache::Policy> make_policy(std::string_view spec, const PolicyContext& context);

// The spec with its key budget set to `kv_share` of the context's keys, for tables at equal
// budgets: streaming (its sinks + window), h2o (half heavy, half recent) and random (sinks, a
// window of an eighth of the budget, the rest drawn). Other options stay. Throws Error for a policy
// without a key budget and for a budget too small to give each part a key.
std::string with_budget(std::string_view spec, double kv_share, int32_t context);

}  // namespace natslm::policies
