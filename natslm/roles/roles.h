// What the roles mean: the only folder that knows the words Global, Local and Sliding window.
// Everything it hands on is lifetimes (base/lifetime.h).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

namespace natslm::roles {

enum Role : int8_t { kGlobal = 0, kLocal = 1, kSliding = 2 };
inline constexpr int kRoles = 3;

// Which roles a model may give. `gs` is Dynamic Memory Sparsification's pair; dense has no score
// layer.
enum class RoleSet : int8_t { kDense, kGls, kGs, kGl };
std::string_view name(RoleSet set);            // "dense", "gls", "gs", "gl"
RoleSet role_set_from(std::string_view name);  // throws Error listing what is allowed

constexpr bool allows(RoleSet set, Role role) {
  if (role == kLocal) return set == RoleSet::kGls || set == RoleSet::kGl;
  if (role == kSliding) return set == RoleSet::kGls || set == RoleSet::kGs;
  return true;
}

struct Options {
  RoleSet set = RoleSet::kGls;
  int32_t window = 16;  // W >= 0: a Sliding token is readable by the next W queries besides its own
  int32_t chunk = 1;    // c >= 1: one role for c consecutive tokens
};

// How a hidden or visible pair counts in the gradient of the roles: method.md's choices, for
// ablations.
struct GradientOptions {
  bool limit_factor = true;        // exp(s - log normaliser) is limited to one
  bool causal_normalizer = false;  // normalise over all causal keys instead of the visible ones
  bool end_term = false;           // a Global pays for the Locals it ends
};

// Throws Error unless window and chunk are in range.
void check(const Options& options);

// The score layer's outputs are head-major: logits[kRoles * head + role], and so are the rows of
// its weight [kRoles * Hkv, width].
//
// The best allowed role of one KV head, ties to the earlier of G, L, S. `bias` (the budget bias) is
// added to the Sliding logit. A logit that is not a number never wins, so that a broken model
// forgets nothing.
constexpr Role best_role(const float* logits, RoleSet set, float bias = 0) {
  Role best = kGlobal;
  float best_score = logits[kGlobal];
  if (allows(set, kLocal) && logits[kLocal] > best_score) {
    best = kLocal;
    best_score = logits[kLocal];
  }
  if (allows(set, kSliding) && logits[kSliding] + bias > best_score) best = kSliding;
  return best;
}

}  // namespace natslm::roles
