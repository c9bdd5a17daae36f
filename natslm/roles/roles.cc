// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/roles.h"

#include <array>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm::roles {
namespace {

constexpr std::array kSets{RoleSet::kDense, RoleSet::kGls, RoleSet::kGs, RoleSet::kGl};
constexpr std::array<std::string_view, 4> kNames{"dense", "gls", "gs", "gl"};

}  // namespace

std::string_view name(RoleSet set) {
  return kNames[static_cast<size_t>(set)];
}

RoleSet role_set_from(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return kSets[i];
  }
  fail("roles ", in_quotes(name), " are unknown; choose one of ", list(kNames));
}

void check(const Options& options) {
  NATSLM_CHECK(options.window >= 0, "window ", options.window, " is negative; 0 keeps only a ",
               "Sliding token's own query");
  NATSLM_CHECK(options.chunk >= 1, "role chunk ", options.chunk, " must be at least 1 token");
}

}  // namespace natslm::roles
