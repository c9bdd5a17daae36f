// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/run_log.h"

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <sstream>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/train/trainer.h"

namespace natslm::train {

using Json = nlohmann::ordered_json;

namespace {

// The lines of an earlier run that are still true after `steps_done` steps.
std::string kept_lines(const std::filesystem::path& path, int64_t steps_done) {
  std::string kept;
  if (steps_done == 0 || !std::filesystem::exists(path)) return kept;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line, nullptr, false);
    const bool of_a_step = json.is_object() && json.contains("step") && json["step"].is_number();
    if (of_a_step && json["step"].get<int64_t>() <= steps_done) kept += line + "\n";
  }
  return kept;
}

}  // namespace

RunLog::RunLog(const std::filesystem::path& path, int64_t steps_done) : path_(path) {
  std::filesystem::create_directories(path.parent_path());
  write_atomically(path, kept_lines(path, steps_done));
  file_.open(path, std::ios::app | std::ios::binary);
  NATSLM_CHECK(file_, "cannot write ", path.string(), ": ", std::strerror(errno));
}

void RunLog::write(const StepReport& r) {
  write(Json{{"step", r.step},
             {"loss", r.loss},
             {"lambda", r.lambda},
             {"kv_end", r.kv_end},
             {"kv_end_sampled", r.sampled.kv_end},
             {"kv_mean_sampled", r.sampled.kv_mean},
             {"pairs_sampled", r.sampled.pairs},
             {"learning_rate", r.learning_rate},
             {"gradient_norm", r.gradient_norm},
             {"tokens_per_s", r.tokens_per_s}});
}

void RunLog::write(int64_t step, const Validation& v) {
  write(Json{{"step", step},
             {"validation_perplexity", v.perplexity},
             {"kv_end", v.shares.kv_end},
             {"kv_mean", v.shares.kv_mean},
             {"pairs", v.shares.pairs}});
}

void RunLog::write(const Json& line) {
  file_ << line.dump() << "\n" << std::flush;
  NATSLM_CHECK(file_, "cannot write ", path_.string(), ": ", std::strerror(errno),
               "; free some space or choose another folder");
}

}  // namespace natslm::train
