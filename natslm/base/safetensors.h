// Weight files in the safetensors format: an 8-byte little-endian header length, a JSON header that
// names each tensor with its type, shape and byte range, then the bytes.
//
// A file is checked completely when it is opened: afterwards every entry has a known type, a shape
// whose size fits its byte range, and ranges that tile the data without gap or overlap. Anything
// else is an Error of one line that names file, tensor, what was found and what was expected.
// Format: https://github.com/huggingface/safetensors
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

#include "natslm/base/atomic_file.h"
#include "natslm/base/mapped_file.h"
#include "natslm/base/weight_type.h"

namespace natslm {

// What __metadata__ holds.
using Metadata = std::map<std::string, std::string>;

class MappedSafetensors {
 public:
  struct Entry {
    std::string name;
    WeightType type = WeightType::kF32;
    std::vector<int64_t> shape;        // empty: a scalar
    std::span<const std::byte> bytes;  // in the mapping; any alignment
  };

  // Maps the file into memory and checks its header. Throws Error.
  explicit MappedSafetensors(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  // For who hands out tensors over the mapping and so has to keep it alive.
  const std::shared_ptr<const MappedFile>& mapped() const { return file_; }
  const std::vector<Entry>& entries() const { return entries_; }  // in the order of their bytes
  const Metadata& metadata() const { return metadata_; }
  const Entry* find(std::string_view name) const;   // nullptr if there is none
  const Entry& entry(std::string_view name) const;  // throws Error if there is none

 private:
  std::shared_ptr<const MappedFile> file_;
  std::vector<Entry> entries_;
  std::map<std::string, size_t, std::less<>> index_;
  Metadata metadata_;
};

// Writes a file tensor by tensor, so that no more than one needs to be in memory. After a crash at
// any moment `path` holds either its old content or all of the new one.
class SafetensorsWriter {
 public:
  struct Tensor {
    std::string name;
    WeightType type = WeightType::kF32;
    std::vector<int64_t> shape;
  };

  // Throws Error for a duplicate or reserved name, text that is not UTF-8, or a type the format
  // lacks.
  SafetensorsWriter(const std::filesystem::path& path, std::span<const Tensor> tensors,
                    const Metadata& metadata = {});
  // The numbers of the tensors in the order in which their bytes must be written: wide types first,
  // so that each starts at a multiple of its element's size.
  const std::vector<size_t>& order() const { return order_; }
  void write(std::span<const std::byte> bytes) { file_.write(bytes.data(), bytes.size()); }
  // The file is there when this returns. Throws Error if the disk is full.
  void commit();

 private:
  std::vector<size_t> order_;
  uint64_t end_ = 0;  // of the file once all is written
  AtomicFile file_;
};

// Which tensors (numbers into `bytes`, the sizes of all) go into which of several files of at most
// `limit` bytes, in order; a larger tensor has a file of its own. At least one file.
std::vector<std::vector<size_t>> plan_shards(std::span<const uint64_t> bytes, uint64_t limit);

// "model.safetensors" if it is the only one, else "model-00001-of-00003.safetensors".
std::string shard_name(size_t shard, size_t shards);

}  // namespace natslm
