// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/model_folder.h"

#include <filesystem>

#include "natslm/base/error.h"

namespace natslm::cli {

void add_model_options(CLI::App& command, ModelOptions& options) {
  command
      .add_option("--model", options.path,
                  "model folder (nats-lm train's or Hugging Face's), or a .gguf file")
      ->required()
      ->type_name("DIR|FILE");
  command
      .add_option("--roles", options.side_car,
                  "role side-car for the model (nats-lm finetune makes them)")
      ->type_name("FILE");
  command
      .add_option("--weights-dtype", options.dtype,
                  "of a pretrained model's matrices; default: float32, on a GPU bfloat16")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
}

at::ScalarType weights_type(const std::string& dtype, const c10::Device& device) {
  if (dtype.empty()) return device.is_cpu() ? at::kFloat : at::kBFloat16;
  return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

ModelFolder open_tokenizer(const std::string& path) {
  NATSLM_CHECK(
      std::filesystem::is_directory(path) || models::is_pretrained(path), path,
      " is no model: give a folder that nats-lm train wrote or one in Hugging Face's layout "
      "(config.json, model.safetensors, tokenizer.json), or a .gguf file");
  ModelFolder opened;
  opened.tokenizer = data::load_tokenizer(path);
  if (models::is_pretrained(path)) opened.chat = data::load_chat_template(path);
  return opened;
}

void open_model(ModelFolder& opened, const ModelOptions& options, const c10::Device& device,
                int32_t context) {
  models::PretrainedOptions how{.type = weights_type(options.dtype, device), .context = context};
  if (!options.side_car.empty()) {
    opened.side_car = models::read_side_car(options.side_car);
    how.roles = opened.side_car->roles;
  }
  opened.model = models::load_model(options.path, how);
  if (opened.side_car) models::attach(*opened.model, *opened.side_car, options.side_car);
  const int32_t known = opened.model->config().vocabulary;
  NATSLM_CHECK(opened.tokenizer->vocabulary() <= known, options.path, ": the tokenizer has ",
               opened.tokenizer->vocabulary(), " tokens, the model knows ", known,
               ": take the tokenizer.json the model was trained with");
  opened.model->to(device);
}

ModelFolder open_model_folder(const ModelOptions& options, const c10::Device& device,
                              int32_t context) {
  ModelFolder opened = open_tokenizer(options.path);
  open_model(opened, options, device, context);
  return opened;
}

}  // namespace natslm::cli
