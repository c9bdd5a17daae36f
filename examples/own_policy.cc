// A policy of one's own in the evicting cache: it keeps every fourth token and the latest 32, and
// the cache gives the memory of the others back at once. SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/randn.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "natslm/base/lifetime.h"
#include "natslm/cache/kv_cache.h"
#include "natslm/cache/policy.h"

namespace {

class EveryFourth : public natslm::cache::Policy {
 public:
  std::string spec() const override { return "every-fourth"; }

  // fresh.last is [KV heads, new tokens], "for ever" until a policy says otherwise.
  void on_append(natslm::cache::NewKeys& fresh,
                 std::span<natslm::cache::StoredKeys> /*stored*/) override {
    auto last = fresh.last.accessor<int32_t, 2>();
    for (int64_t head = 0; head < last.size(0); ++head) {
      for (int64_t t = 0; t < last.size(1); ++t) {
        const int32_t position = fresh.first_position + static_cast<int32_t>(t);
        if (position % 4 != 0) last[head][t] = position + 31;
      }
    }
  }
};

}  // namespace

int main() {
  const natslm::cache::Shape shape = {.layers = 1, .q_heads = 4, .kv_heads = 2, .head_dim = 64};
  natslm::cache::KvCache cache(shape, std::make_unique<EveryFourth>());
  const int32_t slot = cache.add_sequence();
  constexpr int32_t kChunk = 256;
  for (int step = 0; step < 8; ++step) {
    const natslm::cache::Step rows = {.slots = {slot}, .row_start = {0, kChunk}};
    natslm::cache::LayerInput layer;
    layer.q = at::randn({kChunk, shape.q_heads, shape.head_dim});
    layer.k = at::randn({kChunk, shape.kv_heads, shape.head_dim});
    layer.v = at::randn({kChunk, shape.kv_heads, shape.head_dim});
    layer.scale = 0.125;
    cache.attend(0, rows, layer);
    cache.finish_step(rows);
    const natslm::cache::Usage usage = cache.usage();
    std::printf("%5d tokens: %4ld keys alive in a head, %4ld KiB held\n", cache.length(slot),
                long(usage.live_keys / shape.kv_heads), long(usage.held_bytes / 1024));
  }
  // 2,048 / 4 for ever, and of the last 31 tokens the 24 that are none of those.
  const bool expected = cache.live_per_head(slot)[0][0] == 512 + 24;
  std::printf("%s\n", expected ? "as many keys as the rule says" : "NOT as many keys as expected");
  return expected ? 0 : 1;
}
