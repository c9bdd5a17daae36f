// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/model_folder.h"

#include <filesystem>

#include "natslm/base/error.h"

namespace natslm::cli {

ModelFolder open_model_folder(const std::string& folder) {
  NATSLM_CHECK(std::filesystem::is_directory(folder), folder,
               " is not a model folder: give the folder that nats-lm train wrote (config.json, "
               "model.safetensors, tokenizer.json)");
  ModelFolder opened{models::load_model(folder), data::load_tokenizer(folder)};
  const int32_t known = opened.model->config().vocabulary;
  NATSLM_CHECK(opened.tokenizer->vocabulary() <= known, folder, ": the tokenizer has ",
               opened.tokenizer->vocabulary(), " tokens, the model knows ", known,
               ": take the tokenizer.json the model was trained with");
  return opened;
}

}  // namespace natslm::cli
