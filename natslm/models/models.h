// The one table of architectures, presets, and model folders: our own (config.json +
// model.safetensors), Hugging Face's, and GGUF files (tokenizers are data/'s).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string_view>

#include "natslm/models/model.h"
#include "natslm/models/pretrained.h"

namespace natslm::models {

struct Architecture {
  std::string_view name;
  std::string_view description;
  // A model with its first weights.
  std::unique_ptr<Model> (*make)(const Config& config, uint64_t seed);
  // Config of a config.json that names this architecture. Throws Error naming the field. Null for
  // pretrained families, whose config.json is Hugging Face's.
  Config (*parse)(const nlohmann::ordered_json& json) = nullptr;
  // Fills in what the sizes of a config leave open, as is usual in the family; null: nothing is.
  void (*complete)(Config& config) = nullptr;
  // Where pretrained models of it are read from, and on what agreement with the reference
  // implementation was checked; empty: it is trained here.
  std::string_view formats = {}, checked = {};
};
std::span<const Architecture> architectures();

struct Preset {
  std::string_view name;
  std::string_view description;
  Config config;
  int32_t batch;  // sequences a training step
};
std::span<const Preset> presets();
const Preset& preset(std::string_view name);  // throws Error listing what is allowed

// Every preset's window, and the one to take when the context is changed.
constexpr int32_t default_window(int32_t context) {
  return context / 32;
}

// Throws Error naming the field unless a model of this config can be made.
void check(const Config& config);

// Throws Error if the architecture is unknown.
std::unique_ptr<Model> make_model(const Config& config, uint64_t seed);

nlohmann::ordered_json to_json(const Config& config);
// `where` names the file in errors.
Config config_from_json(const nlohmann::ordered_json& json, std::string_view where);

// Creates the folder. Each file is replaced as a whole or not at all.
void save_model(const Model& model, const std::filesystem::path& folder);
void save_config(const Config& config, const std::filesystem::path& folder);

Config load_config(const std::filesystem::path& path);
// Our own folder, or a pretrained model (pretrained.h), which alone the options are for, but for
// `roles` and `seed`: a dense model of ours gets score layers, too, and is frozen but for them.
// Throws Error naming file, tensor, what was found and what was expected.
std::unique_ptr<Model> load_model(const std::filesystem::path& path,
                                  const PretrainedOptions& options = {});
// Fills all parameters from a weight file; tensors of other names in it are an error.
void load_weights(Model& model, const std::filesystem::path& file);

}  // namespace natslm::models
