// The tiny models that `transformers` made (tools/golden_models.py), as folders a user would have.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "natslm/models/model.h"
#include "natslm/models/safetensors.h"

namespace natslm::models {

using Json = nlohmann::ordered_json;

inline const std::filesystem::path kGolden =
    std::filesystem::path(NATSLM_TEST_SOURCE) / "tests" / "golden" / "models";

// name, weights (a file in kGolden), context to open with, config (that of `transformers`).
inline const Json& cases() {
  static const Json all = [] {
    std::ifstream file(kGolden / "cases.json");
    return Json::parse(file);
  }();
  return all;
}

inline const Json& case_named(const std::string& name) {
  return *std::ranges::find_if(cases(), [&](const Json& c) { return c["name"] == name; });
}

inline std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const Json& c : cases()) names.push_back(c["name"]);
  return names;
}

inline std::filesystem::path write_folder(const std::string& name, const Json& config,
                                          const std::filesystem::path& weights) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(::testing::TempDir()) / ("pretrained_" + name);
  fs::create_directories(folder);
  std::ofstream(folder / "config.json") << config;
  fs::copy_file(weights, folder / "model.safetensors", fs::copy_options::overwrite_existing);
  return folder;
}

inline std::filesystem::path write_folder(const Json& a_case) {
  return write_folder(a_case["name"], a_case["config"],
                      kGolden / a_case["weights"].get<std::string>());
}

inline at::Tensor golden_tokens() {
  return SafetensorsFile(kGolden / "logits.safetensors").tensor("tokens").clone();
}

// Logits [T, V] of one sequence, with argmax roles if the model has any.
inline at::Tensor logits_of(Model& model, const at::Tensor& ids) {
  TrainingInput input;
  input.tokens = ids.unsqueeze(0);
  input.sample = false;
  return model.forward(input).logits[0].detach();
}

}  // namespace natslm::models
