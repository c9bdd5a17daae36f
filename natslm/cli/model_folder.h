// A model as a user names it: a folder with config, weights and tokenizer, or a GGUF file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "natslm/data/chat_template.h"
#include "natslm/data/tokenizer.h"
#include "natslm/models/models.h"
#include "natslm/models/side_car.h"
#include "natslm/roles/roles.h"

namespace natslm::cli {

struct ModelFolder {
  std::unique_ptr<models::Model> model;
  std::unique_ptr<data::Tokenizer> tokenizer;
  std::optional<data::ChatTemplate> chat;   // of models that were taught to answer
  std::optional<models::SideCar> side_car;  // that was attached

  bool has_roles() const { return model->config().roles.set != roles::RoleSet::kDense; }
  // What a command uses unless told otherwise.
  std::string default_policy() const { return has_roles() ? "learned" : "full"; }
};

// --model, --roles and --weights-dtype.
struct ModelOptions {
  std::string path;
  std::string dtype;     // empty: float32 on the CPU, bfloat16 on a GPU
  std::string side_car;  // empty: none
};
void add_model_options(CLI::App& command, ModelOptions& options);
// What --weights-dtype means there; empty: the device's default.
at::ScalarType weights_type(const std::string& dtype, const c10::Device& device);

// The same model is another one by how long its texts are (models::PretrainedOptions::context), so
// whoever knows the text first opens the tokenizer alone.
ModelFolder open_tokenizer(const std::string& path);
// Adds the model. `context` 0: the model's own. Throws Error naming the file that is missing or
// damaged, and for a tokenizer that does not fit the model.
void open_model(ModelFolder& opened, const ModelOptions& options, const c10::Device& device,
                int32_t context = 0);
ModelFolder open_model_folder(const ModelOptions& options, const c10::Device& device,
                              int32_t context = 0);

}  // namespace natslm::cli
