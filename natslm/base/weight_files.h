// The tensors of a pretrained model, however its files hold them: one .safetensors file, several
// with an index, or a GGUF file (in one or more parts). Everything is checked when it is opened;
// the bytes are mapped, not read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/base/gguf.h"
#include "natslm/base/mapped_file.h"
#include "natslm/base/safetensors.h"
#include "natslm/base/weight_type.h"

namespace natslm {

class WeightFiles {
 public:
  struct Entry {
    std::string_view name;  // as the file has it: GGUF's names are not Hugging Face's
    WeightType type = WeightType::kF32;
    std::span<const int64_t> shape;    // row-major, outermost first
    std::span<const std::byte> bytes;  // any alignment
    const MappedFile* file = nullptr;  // that holds them
  };

  // `path` is a file (model.safetensors, model.safetensors.index.json, a .gguf, the first of
  // several .gguf) or a folder that holds model.safetensors, model.safetensors.index.json or one
  // GGUF model, looked for in this order. Throws Error.
  static WeightFiles open(const std::filesystem::path& path);

  // Where the model was found: a file, for messages. Copies of this object share the mappings;
  // views returned here live as long as one of them.
  const std::filesystem::path& path() const { return path_; }
  // Its metadata, or nullptr if this is no GGUF model.
  const GgufFile* gguf() const { return gguf_.empty() ? nullptr : gguf_.front().get(); }
  // __metadata__ of all safetensors files together.
  const Metadata& metadata() const { return metadata_; }

  const std::vector<Entry>& entries() const { return entries_; }  // file by file, in their order
  const Entry* find(std::string_view name) const;                 // nullptr if there is none
  const Entry& entry(std::string_view name) const;                // throws Error if there is none
  uint64_t total_bytes() const;                                   // of all tensors

  // Throws Error unless the entry's shape is this one. The name of the file is in the message.
  static void check_shape(const Entry& entry, std::span<const int64_t> shape);

 private:
  WeightFiles() = default;
  void open_safetensors(const std::filesystem::path& file);
  void open_index(const std::filesystem::path& file);
  void open_gguf(const std::filesystem::path& file);
  void add(const Entry& entry);

  std::filesystem::path path_;
  std::vector<std::shared_ptr<const MappedSafetensors>> safetensors_;
  std::vector<std::shared_ptr<const GgufFile>> gguf_;  // its parts
  Metadata metadata_;
  std::vector<Entry> entries_;
  std::map<std::string_view, size_t> index_;
};

}  // namespace natslm
