// Roles that a trained model gave to a text, to be timed instead of random ones.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

#include "natslm/cli/bench.h"

namespace natslm::cli {

struct RecordedRoles {
  Workload work;              // heads, head size, window of the model; `batch` is its layers
  std::vector<int8_t> roles;  // [layers, Hkv, tokens] roles::Role

  RandomRoles lifetimes() const;
  // Random roles with the mean shares of these in every head.
  RandomRoles even() const;
};

// The first `tokens` tokens of the texts through the model in `folder`, on `device`; a text longer
// than the model's context is read in windows of it, whose roles follow each other. `work` supplies
// what does not come from the model. Throws Error for a model without roles or too little text.
RecordedRoles record_roles(const std::string& folder, const std::vector<std::string>& text,
                           const Workload& work, const c10::Device& device);

}  // namespace natslm::cli
