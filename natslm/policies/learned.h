// The model's own score layers decide: a role for every token (or role chunk) of every KV head.
// With a budget the least certain of the keys that would live on are given up where there are too
// many (demotion.h), token by token.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "natslm/cache/policy.h"
#include "natslm/policies/key_cap.h"
#include "natslm/policies/policies.h"
#include "natslm/roles/roles.h"

namespace natslm::policies {

class Demotion;

class Learned : public cache::Policy {
 public:
  // A role chunk that is not complete yet.
  static constexpr int8_t kUndecided = -1;

  // `bias` is added to every Sliding logit: the higher, the fewer keys live. `record`: keep the
  // roles.
  Learned(const roles::Options& options, double bias, bool record);
  // With a budget, if it sets one: for a cache of this shape. `layer_shares` as in KeyCap. Throws
  // Error for what KeyCap refuses.
  Learned(const roles::Options& options, double bias, bool record, const KeyBudget& budget,
          const cache::Shape& shape, std::span<const float> layer_shares);
  ~Learned() override;

  std::string spec() const override;
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override;
  int64_t key_cap(int32_t query) const override;
  int64_t demoted(int32_t slot) const override;
  void reset(int32_t slot) override;

  // The role of every token so far, by position: roles::Role or kUndecided. Needs `record`; empty
  // for what was never appended. A key that was given up for the budget keeps its role.
  std::vector<int8_t> role_of(int32_t slot, int32_t layer, int32_t head) const;

 private:
  // What is known of one (slot, layer).
  struct State {
    std::vector<float> pending;              // [Hkv, 3] logits of the unfinished chunk, summed
    std::vector<std::vector<int8_t>> roles;  // [Hkv][tokens], if recorded
  };
  State& state(int32_t slot, int32_t layer, int64_t heads);
  void decide(const cache::NewKeys& fresh, roles::Role role, int32_t first, int32_t final,
              int32_t* last, cache::StoredKeys& stored) const;

  roles::Options options_;
  double bias_;
  bool record_;
  KeyBudget budget_;
  std::unique_ptr<Demotion> demotion_;      // null: no budget
  std::vector<std::vector<State>> states_;  // [slot][layer]
};

inline constexpr OptionDoc kLearnedOptions[] = {
    {"bias", "0", "added to every Sliding logit: higher keeps fewer keys, lower keeps more"},
    {"budget", "0",
     "most keys that a token may read, as a share of those so far, over all layers and heads; the "
     "least certain are given up. 0: no limit"},
    {"keys", "0", "the same as a number of keys over all layers and heads; 0: no limit"},
};

std::unique_ptr<cache::Policy> make_learned(const Spec& spec, const PolicyContext& context);

}  // namespace natslm::policies
