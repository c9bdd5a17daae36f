// Keeps the first tokens, a window and a uniform sample of the rest: what any method must beat. The
// draw of a token depends on the seed, its layer, KV head and position only, so not on the batch or
// on how the prompt is cut.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/cache/policy.h"
#include "natslm/policies/policies.h"

namespace natslm::policies {

class Random : public cache::Policy {
 public:
  // keep in [0, 1], sinks >= 0, window >= 1.
  Random(double keep, int32_t sinks, int32_t window, uint64_t seed)
      : keep_(keep), sinks_(sinks), window_(window), seed_(seed) {}

  std::string spec() const override;
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override;
  bool edits_stored() const override { return false; }

 private:
  double keep_;
  int32_t sinks_, window_;
  uint64_t seed_;
};

inline constexpr OptionDoc kRandomOptions[] = {
    {"keep", "0.25", "share of the other tokens kept for ever; 0 to 1"},
    {"sinks", "4", "first tokens of a sequence, kept for ever; 0 or more"},
    {"window", "64", "most recent tokens, the query's own included; 1 or more"},
};

std::unique_ptr<cache::Policy> make_random(const Spec& spec, const PolicyContext& context);

}  // namespace natslm::policies
