// A model as a user names it: a folder with config, weights and tokenizer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "natslm/data/tokenizer.h"
#include "natslm/models/models.h"
#include "natslm/roles/roles.h"

namespace natslm::cli {

struct ModelFolder {
  std::unique_ptr<models::Model> model;
  std::unique_ptr<data::Tokenizer> tokenizer;

  bool has_roles() const { return model->config().roles.set != roles::RoleSet::kDense; }
  // What a command uses unless told otherwise.
  std::string default_policy() const { return has_roles() ? "learned" : "full"; }
};

// Throws Error naming the file that is missing or damaged, and for a tokenizer that does not fit
// the model.
ModelFolder open_model_folder(const std::string& folder);

}  // namespace natslm::cli
