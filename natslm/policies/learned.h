// The model's own score layers decide: a role for every token (or role chunk) of every KV head.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "natslm/cache/policy.h"
#include "natslm/policies/policies.h"
#include "natslm/roles/roles.h"

namespace natslm::policies {

class Learned : public cache::Policy {
 public:
  // A role chunk that is not complete yet.
  static constexpr int8_t kUndecided = -1;

  // `bias` is added to every Sliding logit: the higher, the fewer keys live. `record`: keep the
  // roles.
  Learned(const roles::Options& options, double bias, bool record);

  std::string spec() const override;
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override;
  void reset(int32_t slot) override;

  // The role of every token so far, by position: roles::Role or kUndecided. Needs `record`; empty
  // for what was never appended.
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
  std::vector<std::vector<State>> states_;  // [slot][layer]
};

inline constexpr OptionDoc kLearnedOptions[] = {
    {"bias", "0", "added to every Sliding logit: higher keeps fewer keys, lower keeps more"},
};

std::unique_ptr<cache::Policy> make_learned(const Spec& spec, const PolicyContext& context);

}  // namespace natslm::policies
