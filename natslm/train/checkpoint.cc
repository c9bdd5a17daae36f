// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <system_error>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/train/checksum.h"

namespace natslm::train {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

constexpr const char* kState = "trainer.json";
constexpr const char* kLatest = "latest";
constexpr const char* kPrefix = "step-";
constexpr const char* kUnfinished = ".unfinished";  // being written
constexpr const char* kDiscarded = ".discarded";    // being removed

// The step of a checkpoint's folder name, nothing for any other name.
std::optional<int64_t> step_of(const fs::path& folder) {
  const std::string name = folder.filename().string();
  const std::string prefix = kPrefix;
  if (!name.starts_with(prefix)) return std::nullopt;
  int64_t step = 0;
  const char* const end = name.data() + name.size();
  const auto [at, error] = std::from_chars(name.data() + prefix.size(), end, step);
  if (error != std::errc() || at != end || step < 0) return std::nullopt;
  return step;
}

// Checkpoints in a folder, oldest first; none if there is no such folder.
std::vector<fs::path> checkpoints_in(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error))
    if (entry.is_directory(error) && step_of(entry.path())) found.push_back(entry.path());
  std::sort(found.begin(), found.end(),
            [](const fs::path& a, const fs::path& b) { return *step_of(a) < *step_of(b); });
  return found;
}

// The state of a checkpoint; throws Error at the first thing that is not as it was written.
Json verified_state(const fs::path& checkpoint) {
  const fs::path file = checkpoint / kState;
  const Json whole = Json::parse(read_file(file), nullptr, false);
  const bool formed = whole.is_object() && whole.contains("checksum") && whole.contains("files") &&
                      whole.contains("state") && whole["files"].is_object();
  NATSLM_CHECK(formed, file.string(), " is damaged: not the JSON object that was written");
  const std::string sum = hex(checksum(whole["files"].dump() + whole["state"].dump()));
  NATSLM_CHECK(whole["checksum"] == sum, file.string(), " is damaged: its checksum is ", sum,
               ", expected ", whole["checksum"].dump(-1, ' ', true));
  for (const auto& [name, expected] : whole["files"].items()) {
    const std::string found = file_checksum(checkpoint / name);
    NATSLM_CHECK(expected == found, (checkpoint / name).string(), " is damaged: its checksum is ",
                 found, ", expected ", expected.dump());
  }
  return whole["state"];
}

}  // namespace

Checkpoints::Checkpoints(fs::path folder, int64_t keep, Probe probe)
    : folder_(std::move(folder)), keep_(keep), probe_(std::move(probe)) {
  NATSLM_CHECK(keep >= 1, "keep-checkpoints is ", keep, "; it must be at least 1");
}

void Checkpoints::probe(const std::string& stage) const {
  if (probe_) probe_(stage);
}

fs::path Checkpoints::path_of(int64_t step) const {
  std::string digits = std::to_string(step);
  if (digits.size() < 6) digits.insert(0, 6 - digits.size(), '0');
  return folder_ / (kPrefix + digits);
}

void Checkpoints::save(int64_t step, const Json& state, const WriteFiles& write_files) {
  fs::create_directories(folder_);
  remove_leftovers();
  const fs::path target = path_of(step);
  const fs::path unfinished = target.string() + kUnfinished;
  try {
    fs::create_directory(unfinished);
    probe("begun");
    write_files(unfinished);
    probe("files written");
    Json files = Json::object();
    std::vector<fs::path> names;
    for (const auto& entry : fs::directory_iterator(unfinished)) names.push_back(entry.path());
    std::sort(names.begin(), names.end());
    for (const fs::path& name : names) files[name.filename().string()] = file_checksum(name);
    const std::string sum = hex(checksum(files.dump() + state.dump()));
    const Json whole = {{"checksum", sum}, {"files", files}, {"state", state}};
    write_atomically(unfinished / kState, whole.dump(1) + "\n");
    probe("state written");
    sync_tree(unfinished);
    probe("synced");
    // Only a run that was continued from an older checkpoint gets here, and that one still exists.
    if (fs::exists(target)) fs::rename(target, target.string() + kDiscarded);
    probe("old one aside");
    rename_durably(unfinished, target);
  } catch (const fs::filesystem_error& e) {
    std::error_code ignored;
    fs::remove_all(unfinished, ignored);
    fail("cannot write checkpoint ", target.string(), ": ", e.code().message());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(unfinished, ignored);
    throw;
  }
  probe("renamed");
  set_latest(target);
  probe("pointer written");
  prune();
  probe("pruned");
}

void Checkpoints::remove_leftovers() const {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder_, ignored)) {
    const std::string extension = entry.path().extension().string();
    if (extension == kUnfinished || extension == kDiscarded) fs::remove_all(entry.path(), ignored);
  }
}

void Checkpoints::prune() const {
  const std::vector<fs::path> found = all();
  // Under another name first: a checkpoint that lost half its files must not look like one.
  for (size_t i = 0; i + static_cast<size_t>(keep_) < found.size(); ++i) {
    if (found[i] == latest()) continue;
    std::error_code ignored;  // nothing is lost if an old one stays
    fs::rename(found[i], found[i].string() + kDiscarded, ignored);
  }
  probe("renamed old ones");
  remove_leftovers();
}

std::vector<fs::path> Checkpoints::all() const {
  return checkpoints_in(folder_);
}

fs::path Checkpoints::latest() const {
  const fs::path pointer = folder_ / kLatest;
  std::error_code error;
  if (fs::is_regular_file(pointer, error)) {
    std::string name = read_file(pointer);
    name.erase(name.find_last_not_of(" \n\r\t") + 1);
    const fs::path named = folder_ / fs::path(name).filename();
    if (step_of(named) && fs::is_directory(named, error)) return named;
  }
  const std::vector<fs::path> found = all();
  return found.empty() ? fs::path() : found.back();
}

void Checkpoints::set_latest(const fs::path& checkpoint) const {
  write_atomically(folder_ / kLatest, checkpoint.filename().string() + "\n");
}

Json open_checkpoint(const fs::path& checkpoint) {
  try {
    return verified_state(checkpoint);
  } catch (const Error& damage) {
    std::vector<fs::path> others = checkpoints_in(fs::absolute(checkpoint).parent_path());
    std::reverse(others.begin(), others.end());
    for (const fs::path& other : others) {
      if (other.filename() == checkpoint.filename()) continue;
      const fs::path beside = checkpoint.parent_path() / other.filename();
      try {
        verified_state(beside);
      } catch (const Error&) {
        continue;
      }
      fail(damage.what(), "; this one is whole, continue from it with --resume ", beside.string());
    }
    fail(damage.what(), "; there is no other whole checkpoint beside it, start the run again");
  }
}

}  // namespace natslm::train
