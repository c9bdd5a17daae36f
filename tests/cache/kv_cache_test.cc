// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/kv_cache.h"

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include "tests/cache/cache_streams.h"

namespace natslm::test {
namespace {

class KeepAll : public cache::Policy {
 public:
  std::string spec() const override { return "keep all"; }
  void on_append(cache::NewKeys&, std::span<cache::StoredKeys>) override {}
};

TEST(KvCache, KeepingEveryKeyEqualsDenseCausalAttention) {
  const Stream stream = random_stream({2, 4, 2, 16}, 150, 1);
  const std::vector<at::Tensor> last(2, at::full({2, 150}, kForever, at::kInt));
  const auto truth = plain(stream, last);
  for (const int32_t chunk : {1, 7, 64, 150}) {
    cache::KvCache cache(stream.shape, std::make_unique<KeepAll>());
    const auto out = run(cache, cache.add_sequence(), stream, chunk);
    for (int layer = 0; layer < 2; ++layer) {
      EXPECT_LT(worst_difference(out[layer], truth[layer]), 1e-5) << "chunk " << chunk;
    }
  }
}

}  // namespace
}  // namespace natslm::test
