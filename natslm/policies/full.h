// Evicts nothing: the yardstick.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/cache/policy.h"

namespace natslm::policies {

class Full : public cache::Policy {
 public:
  std::string spec() const override { return "full"; }
  void on_append(cache::NewKeys&, std::span<cache::StoredKeys>) override {}
  bool edits_stored() const override { return false; }
};

}  // namespace natslm::policies
