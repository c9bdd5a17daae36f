// Keeps learned roles to a key budget: at every token, in every layer, the least certain keys that
// would live on are given up until what the token's query reads fits the layer's room (key_cap.h).
// A key that is given up is not read by that query any more, and leaves the cache with that step.
//
// What is decided for a token depends on the tokens up to it and on the layers before, never on how
// the text was cut into steps.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "natslm/cache/policy.h"
#include "natslm/policies/key_cap.h"
#include "natslm/policies/key_ledger.h"
#include "natslm/roles/roles.h"

namespace natslm::policies {

class Demotion {
 public:
  Demotion(KeyCap cap, const cache::Shape& shape, const roles::Options& roles);

  // For each Policy::on_append: begin; then for each token arrive, decided for each head if a role
  // chunk ends with the token, settle. Layers in order, as the cache calls them. The arguments of
  // begin must outlive the last settle.
  void begin(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored);
  void arrive(int32_t token);
  // Before the lifetimes of the chunk from `first` to the newest token, and of what a Global ends,
  // are written.
  void decided(int32_t head, roles::Role role, float certainty, int32_t first);
  // After they are: shortens `last` of what must go.
  void settle();

  const KeyCap& cap() const { return cap_; }
  int64_t demoted(int32_t slot) const;  // keys given up so far
  void reset(int32_t slot);

 private:
  struct Slot {
    std::vector<KeyLedger> layers;
    std::vector<int64_t> left;  // of the cap at each token of the step, after the layers so far
    int64_t demoted = 0;
  };
  int32_t* find(const KeyLedger::Key& key) const;

  KeyCap cap_;
  int32_t heads_;
  roles::Options roles_;
  std::vector<int32_t> windows_;
  std::vector<Slot> slots_;

  // Of the call under way.
  Slot* slot_ = nullptr;
  KeyLedger* ledger_ = nullptr;
  int32_t layer_ = 0, first_ = 0, count_ = 0, now_ = 0;
  int32_t* fresh_ = nullptr;  // [heads, count_]: last
  std::span<cache::StoredKeys> stored_;
};

// How sure a model is that a key should outlive its window, from the logits (roles.h) that gave it
// `role`: by how much that role's is above the Sliding one, bias included. Where no key may be
// Sliding, the more Global than Local the surer. Largest for what is not a number, so that a broken
// model forgets last what it did not understand.
float certainty(const float* logits, roles::Role role, roles::RoleSet set, float bias);

}  // namespace natslm::policies
