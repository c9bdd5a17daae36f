// A run of the tiny model: model, text, options and where they meet.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "natslm/train/trainer.h"
#include "tests/support/scratch_folder.h"
#include "tests/train/tiny_model.h"

namespace natslm::train {

using test::ScratchFolder;

// What is in a folder, sorted.
inline std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    names.insert(entry.path().filename());
  return {names.begin(), names.end()};
}

inline Options tiny_options() {
  Options o;
  o.steps = 20;
  o.batch = 4;
  o.context = 16;
  o.warm_up = 3;
  o.learning_rate = 1e-2;
  o.kv_budget = 0.3;
  o.log_every = 5;
  o.checkpoint_every = 0;
  o.seed = 7;
  return o;
}

// Many checkpoints, so that a kill often meets one being written.
inline Options kill_options() {
  Options o = tiny_options();
  o.steps = 40;
  o.checkpoint_every = 3;
  return o;
}

struct TinyRun {
  explicit TinyRun(bool dense = false) : model(dense) {}
  TinyModel model;
  data::TokenDataset dataset{tiny_text(4000), TinyModel::kVocabulary, 5};
  Options options = tiny_options();
  Parts parts;
  Trainer trainer(const std::filesystem::path& folder) {
    return Trainer(model, dataset, options, folder, parts);
  }
};

}  // namespace natslm::train
