// Models of any architecture with sizes for tests.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <string_view>

#include "natslm/models/models.h"

namespace natslm::test {

// Two layers of a dense model; what is wanted otherwise is changed before completed().
inline models::Config small_sizes(std::string_view architecture) {
  models::Config c;
  c.architecture = architecture;
  c.layers = 2;
  c.width = 32;
  c.q_heads = 4;
  c.kv_heads = architecture == "gpt2" ? 4 : 2;  // its files cannot say that queries share keys
  c.head_dim = 8;
  c.hidden = 48;
  c.vocabulary = 61;
  c.context = 96;
  c.roles.set = roles::RoleSet::kDense;
  return c;
}

// With the block options that models of these sizes have in their family.
inline models::Config completed(models::Config config) {
  for (const models::Architecture& a : models::architectures()) {
    if (a.name == config.architecture && a.complete) a.complete(config);
  }
  return config;
}

// Weights as small as training starts with would give every token nearly the same chance.
inline void enlarge_weights(models::Model& model) {
  const c10::NoGradGuard no_grad;
  for (const auto& [name, value] : model.parameters()) {
    if (value.dim() == 2) value.mul_(8);
  }
}

}  // namespace natslm::test
