// Attention where every key has a lifetime: draws roles at random, turns them into lifetimes, and
// compares the work with dense attention. When every key lives for ever, the two agree.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/allclose.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/ops/attention.h"
#include "natslm/roles/lifetimes.h"

int main() {
  constexpr int32_t kBatch = 1, kQueryHeads = 6, kKvHeads = 2, kTokens = 512, kHeadDim = 64;
  const at::Tensor q = at::randn({kBatch, kQueryHeads, kTokens, kHeadDim});
  const at::Tensor k = at::randn({kBatch, kKvHeads, kTokens, kHeadDim});
  const at::Tensor v = at::randn({kBatch, kKvHeads, kTokens, kHeadDim});

  // One token in eight is Global, one in eight Local, the others live for a window of 16 queries.
  const natslm::roles::Options options = {.set = natslm::roles::RoleSet::kGls, .window = 16};
  const at::Tensor last = at::zeros({kBatch, kKvHeads, kTokens}, at::kInt);
  int64_t pairs = 0;
  for (int32_t head = 0; head < kKvHeads; ++head) {
    const at::Tensor draw = at::randint(8, {kTokens}, at::kLong);
    std::vector<int8_t> roles;
    for (int32_t j = 0; j < kTokens; ++j) {
      const int64_t d = draw.const_data_ptr<int64_t>()[j];
      roles.push_back(d == 0 || j == 0 ? natslm::roles::kGlobal
                      : d == 1         ? natslm::roles::kLocal
                                       : natslm::roles::kSliding);
    }
    const std::span<int32_t> row(last.mutable_data_ptr<int32_t>() + head * kTokens, kTokens);
    natslm::roles::write_lifetimes(roles, kTokens, options, {.last = row, .horizon = {}});
    for (int32_t j = 0; j < kTokens; ++j) pairs += natslm::queries_served(j, row[j], kTokens);
  }
  const natslm::ops::AttentionResult result = natslm::ops::attention(q, k, v, last);
  const double causal = 0.5 * kTokens * (kTokens + 1) * kKvHeads;
  std::printf("output %ld x %ld x %ld x %ld; %.1f %% of the causal pairs are alive\n",
              long(result.out.size(0)), long(result.out.size(1)), long(result.out.size(2)),
              long(result.out.size(3)), 100 * double(pairs) / causal);

  const at::Tensor forever = at::full_like(last, natslm::kForever);
  const at::Tensor all = natslm::ops::attention(q, k, v, forever).out;
  const at::Tensor dense = at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true,
                                                            std::nullopt, /*enable_gqa=*/true);
  const bool same = at::allclose(all, dense, 1e-4, 1e-5);
  std::printf("with every key alive it %s dense attention\n", same ? "equals" : "DIFFERS from");
  return same ? 0 : 1;
}
