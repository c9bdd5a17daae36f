// H2O, the heavy-hitter oracle (Zhang et al., NeurIPS 2023): after every step, decode included, a
// KV head keeps its `recent` last keys and, of the others, the `heavy` ones that have received most
// attention so far (summed over the group's query heads). Survivors keep their sums.
//
// The method decides per step, so the tokens a step may append are part of its definition: `chunk`.
// chunk=1 is the method to the letter; larger chunks decide after each chunk, and are faster.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "natslm/cache/policy.h"
#include "natslm/policies/policies.h"

namespace natslm::policies {

class H2o : public cache::Policy {
 public:
  // Counts of keys; heavy >= 0, recent >= 1, chunk >= 0 (0: no limit).
  H2o(int32_t heavy, int32_t recent, int32_t chunk)
      : heavy_(heavy), recent_(recent), chunk_(chunk) {}

  std::string spec() const override;
  void on_append(cache::NewKeys&, std::span<cache::StoredKeys>) override {}
  void after_step(int32_t slot, int32_t layer, int32_t now,
                  std::span<cache::StoredKeys> stored) override;
  bool wants_mass() const override { return true; }
  int32_t chunk_limit() const override { return chunk_; }

 private:
  int32_t heavy_, recent_, chunk_;
  std::vector<int32_t> candidates_;  // of one call
};

inline constexpr OptionDoc kH2oOptions[] = {
    {"heavy", "0.1",
     "keys kept for the attention they received; below 1 a share of the context, "
     "from 1 on a count"},
    {"recent", "0.1", "most recent keys kept; below 1 a share of the context, from 1 on a count"},
    {"chunk", "16",
     "most tokens appended between two decisions; 1 is the method to the letter, 0 sets "
     "no limit"},
};

std::unique_ptr<cache::Policy> make_h2o(const Spec& spec, const PolicyContext& context);

}  // namespace natslm::policies
