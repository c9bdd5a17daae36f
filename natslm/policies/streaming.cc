// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/streaming.h"

#include <algorithm>

namespace natslm::policies {
namespace {

std::unique_ptr<cache::Policy> make(const Spec& spec, Streaming::Positions positions) {
  return std::make_unique<Streaming>(spec.integer("sinks", 4, 0, kMaxPosition),
                                     spec.integer("window", 252, 1, kMaxPosition), positions);
}

}  // namespace

std::string Streaming::spec() const {
  Spec spec(renumbers() ? "streaming" : "streaming-original");
  spec.set("sinks", std::to_string(sinks_));
  spec.set("window", std::to_string(window_));
  return spec.text();
}

void Streaming::on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys>) {
  auto last = fresh.last.accessor<int32_t, 2>();
  for (int64_t t = 0; t < last.size(1); ++t) {
    const int64_t position = fresh.first_position + t;
    const int64_t end = std::min<int64_t>(position + window_ - 1, kMaxPosition);
    for (int64_t h = 0; h < last.size(0); ++h) {
      last[h][t] = position < sinks_ ? kForever : static_cast<int32_t>(end);
    }
  }
}

int32_t Streaming::key_position(int32_t rank, int32_t, int32_t position) const {
  return renumbers() ? rank : position;
}

std::unique_ptr<cache::Policy> make_streaming(const Spec& spec, const PolicyContext&) {
  return make(spec, Streaming::Positions::kCache);
}

std::unique_ptr<cache::Policy> make_streaming_original(const Spec& spec, const PolicyContext&) {
  return make(spec, Streaming::Positions::kOriginal);
}

}  // namespace natslm::policies
