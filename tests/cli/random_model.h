// Model folders with random weights, written as training writes them: for tests of commands.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "natslm/roles/roles.h"

namespace natslm::test {

struct RandomModel {
  std::string architecture = "gpt";  // of a pretrained family: dense, in Hugging Face's layout
  int32_t context = 128;
  int32_t layers = 2;
  roles::RoleSet set = roles::RoleSet::kGls;
  bool all_global = false;  // the roles are learned, and every one is Global
  uint64_t seed = 1;
  float norms = 1;  // weights of all norms, by which side-cars tell models apart
};

// config.json, model.safetensors, tokenizer.json.
void write_model(const std::filesystem::path& folder, const RandomModel& what = {});

// Some 20 kB of varied text, the same each time; the tokenizers of all random models are trained on
// it.
std::string sample_text();

}  // namespace natslm::test
