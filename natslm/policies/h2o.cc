// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/h2o.h"

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"

namespace natslm::policies {
namespace {

// Below 1 a share of the context, from 1 on a count.
int32_t keys(const Spec& spec, std::string_view option, double fallback, int32_t context) {
  const double value = spec.number(option, fallback, 0, kMaxPosition);
  if (value >= 1) return static_cast<int32_t>(std::lround(value));
  NATSLM_CHECK(context > 0, "policy h2o: ", option, "=", value,
               " is a share of the context, which is not known here; give a count");
  return static_cast<int32_t>(std::lround(value * context));
}

}  // namespace

std::string H2o::spec() const {
  Spec spec("h2o");
  spec.set("heavy", std::to_string(heavy_));
  spec.set("recent", std::to_string(recent_));
  spec.set("chunk", std::to_string(chunk_));
  return spec.text();
}

void H2o::after_step(int32_t, int32_t, int32_t now, std::span<cache::StoredKeys> stored) {
  for (cache::StoredKeys& keys : stored) {
    candidates_.clear();
    for (size_t j = 0; j < keys.position.size(); ++j) {
      keys.score[j] += keys.mass[j];
      if (keys.position[j] < now - recent_) candidates_.push_back(static_cast<int32_t>(j));
    }
    if (std::ssize(candidates_) <= heavy_) continue;
    // Equal sums: the later key is kept.
    std::nth_element(candidates_.begin(), candidates_.begin() + heavy_, candidates_.end(),
                     [&](int32_t a, int32_t b) {
                       if (keys.score[a] != keys.score[b]) return keys.score[a] > keys.score[b];
                       return keys.position[a] > keys.position[b];
                     });
    for (auto loser = candidates_.begin() + heavy_; loser != candidates_.end(); ++loser) {
      keys.last[*loser] = now - 1;
    }
  }
}

std::unique_ptr<cache::Policy> make_h2o(const Spec& spec, const PolicyContext& context) {
  const int32_t heavy = keys(spec, "heavy", 0.1, context.context);
  const int32_t recent = std::max(1, keys(spec, "recent", 0.1, context.context));
  return std::make_unique<H2o>(heavy, recent, spec.integer("chunk", 16, 0, kMaxPosition));
}

}  // namespace natslm::policies
