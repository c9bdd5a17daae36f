// Checkpoints of a run: folders `step-000200` under one folder, and a file `latest` that names the
// one to continue from.
//
// A checkpoint appears by one rename, with every byte on disk before, so a folder of that name is
// whole whenever the process was killed; what a killed process left half-written carries another
// name and is removed by the next save. Each file's size and checksum stand in trainer.json (and
// trainer.json's own in itself), so damage after the fact is refused instead of trained on.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace natslm::train {

class Checkpoints {
 public:
  // Writes the checkpoint's files (all but trainer.json) into the folder it is given.
  using WriteFiles = std::function<void(const std::filesystem::path& folder)>;
  // Called between the stages of a save with the stage's name; tests kill the process there.
  using Probe = std::function<void(const std::string& stage)>;

  // `folder` need not exist yet. The `keep` >= 1 newest checkpoints are kept.
  Checkpoints(std::filesystem::path folder, int64_t keep, Probe probe = {});

  // Saves step `step` with this state, replacing one of the same step. Throws Error (disk full,
  // ...); the checkpoints before are then untouched and nothing half-written stays.
  void save(int64_t step, const nlohmann::ordered_json& state, const WriteFiles& write_files);

  // The one to continue from: the folder that `latest` names, else the newest; empty if there is
  // none.
  std::filesystem::path latest() const;
  // All, oldest first.
  std::vector<std::filesystem::path> all() const;
  // Makes a checkpoint of this folder the one to continue from.
  void set_latest(const std::filesystem::path& checkpoint) const;

 private:
  std::filesystem::path path_of(int64_t step) const;
  void remove_leftovers() const;
  void prune() const;
  void probe(const std::string& stage) const;

  std::filesystem::path folder_;
  int64_t keep_;
  Probe probe_;
};

// Checks every file of a checkpoint against its checksum and returns the state saved with it.
// Throws Error naming the damaged or missing file and, if there is one, the newest other checkpoint
// beside it that is whole.
nlohmann::ordered_json open_checkpoint(const std::filesystem::path& checkpoint);

}  // namespace natslm::train
