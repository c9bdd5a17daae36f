// Opening pretrained models: a folder in Hugging Face's layout (config.json, safetensors) or a GGUF
// file, of any family in family.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "natslm/models/model.h"

namespace natslm::models {

struct PretrainedOptions {
  at::ScalarType type = at::kFloat;  // of the matrices: float or bfloat16
  // Longest text that will be read: sizes tables, and decides what depends on it (rope.h). 0: what
  // the model's config names; more than that only where positions are not learned.
  int32_t context = 0;
  // Score layers to add, with first weights from `seed`; dense: none.
  roles::Options roles = {.set = roles::RoleSet::kDense};
  uint64_t seed = 0;
};

// Whether `path` is a GGUF file or a folder with Hugging Face's config.json, or throws if damaged.
bool is_pretrained(const std::filesystem::path& path);

// Throws Error naming file, field or tensor, what was found and what was expected: for a family or
// a field that this build does not know, for a tensor that is missing, of another shape, or left
// over. The weights are frozen, the score layers are not.
std::unique_ptr<Model> open_pretrained(const std::filesystem::path& path,
                                       const PretrainedOptions& options = {});

// Its config alone.
Config pretrained_config(const std::filesystem::path& path);
// `where` names the file in errors.
Config config_from_hf(const nlohmann::ordered_json& json, std::string_view where);

}  // namespace natslm::models
