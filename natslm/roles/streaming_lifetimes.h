// Lifetimes of tokens that arrive one after the other, when the next Global is not known yet: what
// a cache that is being filled needs. Integer arithmetic only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "natslm/base/lifetime.h"
#include "natslm/roles/roles.h"

namespace natslm::roles {

// `last` of the tokens of a complete role chunk that ends with token `final`. A Local's end is not
// known yet: kOpenEnded. A Global also ends every open Local before its chunk, with last = `final`.
constexpr int32_t arriving_last(Role role, int32_t final, int32_t window) {
  if (role == kGlobal) return kForever;
  if (role == kLocal) return kOpenEnded;
  return static_cast<int32_t>(std::min<int64_t>(int64_t{final} + window, kMaxPosition));
}

}  // namespace natslm::roles
