// Writing models of the pretrained families as folders in Hugging Face's layout, which
// `transformers`, and pretrained.h, open: config.json and safetensors. Tokenizers are data/'s.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "natslm/models/model.h"

namespace natslm::models {

struct SaveOptions {
  // Of all tensors in the files: float, bfloat16 or half. None: each keeps its own, matrices the
  // type the model was opened with, the rest float32, so that nothing is lost.
  std::optional<at::ScalarType> type;
  uint64_t shard_bytes = 5'000'000'000;  // largest file; a larger tensor has one of its own
  // For config.json, where they change nothing here; -1: null.
  int32_t begin_token = -1, pad_token = -1;
};

// Whether save_pretrained() can write models of this architecture.
bool is_family(const Config& config);

// Creates the folder and writes config.json last. Weights are in the family's own names and layouts
// wherever they came from (a GGUF file, say), one tensor beside the model in memory. Score layers
// are left out: the layout has no place for them. Throws Error, before anything is written, for a
// model that the family's config.json cannot describe, and for weights that are out of half's
// range.
void save_pretrained(const Model& model, const std::filesystem::path& folder,
                     const SaveOptions& options = {});

// The config.json without `torch_dtype`. Throws Error naming what it cannot say.
nlohmann::ordered_json config_to_hf(const Config& config);

}  // namespace natslm::models
