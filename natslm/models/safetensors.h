// Weight files in the safetensors format: an 8-byte little-endian header length, a JSON header that
// names each tensor with its type, shape and byte range, then the bytes.
//
// A file is checked completely when it is opened: afterwards every entry has a known type, a shape
// whose size fits its byte range, and ranges that tile the data without gap or overlap. Anything
// else is an Error of one line that names file, tensor, what was found and what was expected.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "natslm/models/model.h"

namespace natslm::models {

using Metadata = std::map<std::string, std::string>;

class SafetensorsFile {
 public:
  struct Entry {
    std::string name;
    at::ScalarType dtype = at::kFloat;
    std::vector<int64_t> shape;  // empty: a scalar
    uint64_t offset = 0;         // of the first byte, from the start of the file
    uint64_t bytes = 0;
  };

  // Maps the file into memory and checks its header. Throws Error.
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const std::vector<Entry>& entries() const { return entries_; }  // in the order of their bytes
  const Metadata& metadata() const { return metadata_; }
  bool contains(const std::string& name) const { return index_.contains(name); }

  // The tensor on the CPU, in the file's type. It shares the (private, copy-on-write) mapping,
  // which lives as long as a tensor made from it. Throws Error if the file has no tensor of that
  // name.
  at::Tensor tensor(const std::string& name) const;
  // The same, and throws Error unless the shape is this one and the type a floating-point one.
  at::Tensor tensor(const std::string& name, at::IntArrayRef shape) const;

 private:
  class Mapping;
  const Entry& entry(const std::string& name) const;

  std::filesystem::path path_;
  std::shared_ptr<Mapping> mapping_;
  std::vector<Entry> entries_;
  std::map<std::string, size_t> index_;
  Metadata metadata_;
};

// Writes all tensors (any device, any strides) so that after a crash at any moment `path` holds
// either its old content or all of the new one. Throws Error for a duplicate or reserved name, a
// type the format lacks, or a failed write (disk full); the old file is then untouched.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const Metadata& metadata = {});

}  // namespace natslm::models
