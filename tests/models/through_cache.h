// A model's logits as inference makes them: through a cache, some tokens a step.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/models/model.h"
#include "natslm/policies/policies.h"

namespace natslm::models {

inline cache::KvCache make_cache(const Model& model, const std::string& policy, float bias = 0) {
  const policies::PolicyContext context{.shape = model.cache_shape(),
                                        .roles = model.config().roles,
                                        .bias = bias,
                                        .context = model.config().context};
  return cache::KvCache(model.cache_shape(), policies::make_policy(policy, context));
}

// Logits [T, V] of tokens [T], as a new sequence in steps of `chunk`.
inline at::Tensor through_cache(Model& model, cache::KvCache& cache, const at::Tensor& tokens,
                                int64_t chunk) {
  const int32_t slot = cache.add_sequence();
  std::vector<at::Tensor> logits;
  for (int64_t begin = 0; begin < tokens.size(0); begin += chunk) {
    const int64_t count = std::min(chunk, tokens.size(0) - begin);
    StepInput input;
    input.step = {.slots = {slot}, .row_start = {0, static_cast<int32_t>(count)}};
    input.tokens = tokens.narrow(0, begin, count);
    logits.push_back(model.step(input, cache));
  }
  return at::cat(logits);
}

}  // namespace natslm::models
