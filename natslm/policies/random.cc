// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/random.h"

#include <algorithm>

#include "natslm/base/counter_rng.h"

namespace natslm::policies {

std::string Random::spec() const {
  Spec spec("random");
  spec.set("keep", shortest(keep_));
  spec.set("sinks", std::to_string(sinks_));
  spec.set("window", std::to_string(window_));
  return spec.text();
}

void Random::on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys>) {
  const uint64_t mixed = mix64(seed_);
  const std::array<uint32_t, 2> key{static_cast<uint32_t>(mixed),
                                    static_cast<uint32_t>(mixed >> 32)};
  auto last = fresh.last.accessor<int32_t, 2>();
  for (int64_t h = 0; h < last.size(0); ++h) {
    for (int64_t t = 0; t < last.size(1); ++t) {
      const int32_t position = fresh.first_position + static_cast<int32_t>(t);
      if (position < sinks_) continue;
      const auto words = philox(key, {static_cast<uint32_t>(position), static_cast<uint32_t>(h),
                                      static_cast<uint32_t>(fresh.layer), 0});
      if (open_unit(words[0]) < keep_) continue;
      last[h][t] =
          static_cast<int32_t>(std::min<int64_t>(int64_t{position} + window_ - 1, kMaxPosition));
    }
  }
}

std::unique_ptr<cache::Policy> make_random(const Spec& spec, const PolicyContext& context) {
  return std::make_unique<Random>(spec.number("keep", 0.25, 0, 1),
                                  spec.integer("sinks", 4, 0, kMaxPosition),
                                  spec.integer("window", 64, 1, kMaxPosition), context.seed);
}

}  // namespace natslm::policies
