// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/weight_files.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr auto kSingleFile = "model.safetensors";
constexpr auto kIndexFile = "model.safetensors.index.json";
constexpr uint64_t kMaxIndexBytes = 100'000'000;  // as a safetensors header
constexpr int kMaxIndexNesting = 2;               // the index, its maps
constexpr uint32_t kMaxParts = 10'000;            // of a GGUF model

bool starts_like_gguf(const fs::path& file) {
  char mark[4] = {};
  std::ifstream(file, std::ios::binary).read(mark, sizeof(mark));
  return std::string_view(mark, sizeof(mark)) == "GGUF";
}

// The tensors' names and the files that hold them.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const std::string file = path.string();
  std::error_code unreadable;
  const auto size = fs::file_size(path, unreadable);
  NATSLM_CHECK(unreadable || size <= kMaxIndexBytes, file, ": has ", size,
               " bytes, expected at most ", kMaxIndexBytes);
  const std::string text = read_file(path);
  std::set<std::string> names;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    NATSLM_CHECK(event != Event::array_start, file,
                 ": holds a list, expected an object with 'weight_map'");
    NATSLM_CHECK(event != Event::object_start || depth < kMaxIndexNesting, file,
                 ": nests more than ", kMaxIndexNesting, " levels deep; it is not a weight index");
    if (event == Event::key) {
      const auto& name = parsed.get_ref<const std::string&>();
      if (depth == 1) names.clear();
      NATSLM_CHECK(depth == 1 || names.insert(name).second, file, ": tensor ", in_quotes(name),
                   " stands twice in the index; names must be unique");
    }
    return true;
  };
  json index;
  try {
    index = json::parse(text, watch);
  } catch (const json::exception&) {
    fail(file, ": is not valid JSON; the file is damaged, get it again");
  }
  NATSLM_CHECK(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(),
               file, ": has no object 'weight_map'; it is not a weight index");
  std::map<std::string, std::string> result;
  for (const auto& [name, value] : index["weight_map"].items()) {
    NATSLM_CHECK(value.is_string(), file, ": tensor ", in_quotes(name),
                 " has no file name, expected a string");
    const auto& holder = value.get_ref<const std::string&>();
    // A name with a folder in it would let an index read anywhere, one with a line break would
    // break the messages that it stands in.
    const bool plain = std::ranges::none_of(
        holder, [](char c) { return static_cast<unsigned char>(c) < ' ' || c == '\x7f'; });
    NATSLM_CHECK(!holder.empty() && holder == fs::path(holder).filename() && holder != "." &&
                     holder != ".." && plain,
                 file, ": tensor ", in_quotes(name), " lies in ", in_quotes(holder),
                 ", expected the name of a file in the same folder");
    result[name] = holder;
  }
  return result;
}

// "name-00001-of-00003.gguf" for part `part` (from 0) of a model whose part `given` is `file`.
fs::path part_of(const fs::path& file, uint32_t given, uint32_t part, uint32_t parts) {
  const auto suffix = [&](uint32_t number) {
    const auto padded = [](uint32_t n) {
      const std::string digits = std::to_string(n);
      return std::string(5 - std::min<size_t>(digits.size(), 5), '0') + digits;
    };
    return "-" + padded(number + 1) + "-of-" + padded(parts) + ".gguf";
  };
  const std::string name = file.filename().string(), ending = suffix(given);
  NATSLM_CHECK(name.ends_with(ending), file.string(), ": is part ", given + 1, " of ", parts,
               " of a model, so its name must end in '", ending, "' for the others to be found");
  return file.parent_path() / (name.substr(0, name.size() - ending.size()) + suffix(part));
}

}  // namespace

WeightFiles WeightFiles::open(const fs::path& path) {
  WeightFiles result;
  result.path_ = path;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    std::vector<fs::path> gguf;
    for (const auto& entry : fs::directory_iterator(path, ignored))
      if (entry.path().extension() == ".gguf") gguf.push_back(entry.path());
    std::sort(gguf.begin(), gguf.end());
    if (fs::exists(path / kSingleFile, ignored)) {
      result.path_ = path / kSingleFile;
    } else if (fs::exists(path / kIndexFile, ignored)) {
      result.path_ = path / kIndexFile;
    } else {
      NATSLM_CHECK(!gguf.empty(), path.string(), ": holds no weights, expected ", kSingleFile, ", ",
                   kIndexFile, " or a .gguf file");
      result.path_ = gguf.front();
    }
    result = open(result.path_);
    // Either there was one, or all of them are parts of the one that was opened.
    NATSLM_CHECK(!result.gguf() || result.gguf_.size() == gguf.size(), path.string(), ": holds ",
                 gguf.size(), " .gguf files, ", gguf.front().filename().string(), " and ",
                 gguf.back().filename().string(), " among them; name the one to open");
    return result;
  }
  if (path.extension() == ".json") {
    result.open_index(path);
  } else if (path.extension() == ".gguf" || starts_like_gguf(path)) {
    result.open_gguf(path);
  } else {
    result.open_safetensors(path);
  }
  return result;
}

void WeightFiles::add(const Entry& entry) {
  const auto [at, fresh] = index_.emplace(entry.name, entries_.size());
  NATSLM_CHECK(fresh, entry.file->path().string(), ": tensor ", in_quotes(entry.name),
               " stands in ", entries_[at->second].file->path().filename().string(),
               " too; a tensor must be in one file of a model");
  entries_.push_back(entry);
}

void WeightFiles::open_safetensors(const fs::path& path) {
  const auto& file = safetensors_.emplace_back(std::make_shared<const MappedSafetensors>(path));
  for (const MappedSafetensors::Entry& e : file->entries())
    add({e.name, e.type, e.shape, e.bytes, file->mapped().get()});
  metadata_.insert(file->metadata().begin(), file->metadata().end());
}

void WeightFiles::open_index(const fs::path& path) {
  const auto holders = read_index(path);
  std::set<std::string> files;
  for (const auto& [name, holder] : holders) files.insert(holder);
  for (const std::string& file : files) open_safetensors(path.parent_path() / file);
  for (const auto& [name, holder] : holders) {
    const Entry* found = find(name);
    NATSLM_CHECK(found && found->file->path().filename() == holder, path.string(), ": tensor ",
                 in_quotes(name), " should be in ", in_quotes(holder), ", but is ",
                 found ? "in " + in_quotes(found->file->path().filename().string()) : "not there",
                 "; index and files do not belong together");
  }
  for (const Entry& e : entries_) {
    NATSLM_CHECK(holders.contains(std::string(e.name)), path.string(), ": does not know tensor ",
                 in_quotes(e.name), " of ", e.file->path().filename().string(),
                 "; index and files do not belong together");
  }
}

void WeightFiles::open_gguf(const fs::path& path) {
  const auto open_part = [&](const fs::path& file) {
    gguf_.push_back(std::make_shared<const GgufFile>(GgufFile::open(file)));
  };
  open_part(path);
  const uint32_t parts = std::max(gguf_[0]->get_u32("split.count", 1), 1u);
  if (parts > 1) {
    NATSLM_CHECK(parts <= kMaxParts, path.string(), ": metadata 'split.count' is ", parts,
                 ", expected at most ", kMaxParts);
    const uint32_t given = gguf_[0]->get_u32("split.no");
    gguf_.clear();
    for (uint32_t part = 0; part < parts; ++part) {
      open_part(part_of(path, given, part, parts));
      const GgufFile& file = *gguf_.back();
      const uint32_t number = file.get_u32("split.no"), count = file.get_u32("split.count");
      NATSLM_CHECK(number == part && count == parts, file.path().string(), ": is part ", number + 1,
                   " of ", count, ", expected part ", part + 1, " of ", parts);
    }
  }
  for (const auto& file : gguf_)
    for (const GgufFile::Tensor& t : file->tensors())
      add({t.name, t.type, t.shape, t.bytes, file->mapped().get()});
  const uint32_t expected =
      gguf_[0]->get_u32("split.tensors.count", static_cast<uint32_t>(entries_.size()));
  NATSLM_CHECK(expected == entries_.size(), path.string(), ": its parts hold ", entries_.size(),
               " tensors, expected ", expected);
}

const WeightFiles::Entry* WeightFiles::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &entries_[found->second];
}

const WeightFiles::Entry& WeightFiles::entry(std::string_view name) const {
  const Entry* found = find(name);
  NATSLM_CHECK(found, path_.string(), ": has no tensor ", in_quotes(name), "; it has ",
               entries_.size(), " tensors",
               entries_.empty() ? "" : ", the first is " + in_quotes(entries_.front().name));
  return *found;
}

uint64_t WeightFiles::total_bytes() const {
  uint64_t total = 0;
  for (const Entry& e : entries_) total += e.bytes.size();
  return total;
}

void WeightFiles::check_shape(const Entry& entry, std::span<const int64_t> shape) {
  NATSLM_CHECK(std::ranges::equal(entry.shape, shape), entry.file->path().string(), ": tensor ",
               in_quotes(entry.name), " has shape [", list(entry.shape), "], expected [",
               list(shape), "]");
}

}  // namespace natslm
