// log.jsonl of a run: a JSON object a line, for programs to read. Lines of steps that a killed run
// did after its last checkpoint are taken back when it continues, so each step stands there once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>

namespace natslm::train {

struct StepReport;
struct Validation;

class RunLog {
 public:
  // Opens the log for a run that has `steps_done` steps behind it: keeps the whole lines of steps
  // up to there, drops the rest (and everything if steps_done is 0). Throws Error if it cannot be
  // written.
  RunLog(const std::filesystem::path& path, int64_t steps_done);

  // {"step": ..., "loss": ..., ...}
  void write(const StepReport& mean);
  // {"step": ..., "validation_perplexity": ..., ...}
  void write(int64_t step, const Validation& validation);
  // Any other line, for example the result.
  void write(const nlohmann::ordered_json& line);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace natslm::train
