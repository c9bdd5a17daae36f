// Weight files as tensors: the safetensors container of natslm/base/safetensors.h opened as mapped
// tensors of the file's own types, and written, as one file or as several with an index. Weights of
// pretrained models in any format are read by natslm/models/read_weights.h instead.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "natslm/base/safetensors.h"
#include "natslm/models/model.h"

namespace natslm::models {

using natslm::Metadata;

class SafetensorsFile {
 public:
  // Maps the file into memory and checks its header. Throws Error.
  explicit SafetensorsFile(const std::filesystem::path& path) : file_(path) {}

  const std::filesystem::path& path() const { return file_.path(); }
  // In the order of their bytes.
  const std::vector<MappedSafetensors::Entry>& entries() const { return file_.entries(); }
  const Metadata& metadata() const { return file_.metadata(); }
  bool contains(const std::string& name) const { return file_.find(name) != nullptr; }

  // The tensor on the CPU, in the file's type. It shares the (private, copy-on-write) mapping,
  // which lives as long as a tensor made from it. Throws Error if the file has no tensor of that
  // name, or one of a type that is not used here (the unsigned ones wider than a byte, 8-bit
  // floating-point ones).
  at::Tensor tensor(const std::string& name) const;
  // The same, and throws Error unless the shape is this one and the type a floating-point one.
  at::Tensor tensor(const std::string& name, at::IntArrayRef shape) const;

 private:
  MappedSafetensors file_;
};

// Writes all tensors (any device, any strides) so that after a crash at any moment `path` holds
// either its old content or all of the new one. Throws Error for a duplicate or reserved name, a
// type the format lacks, or a failed write (disk full); the old file is then untouched.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const Metadata& metadata = {});

struct ExportOptions {
  std::optional<at::ScalarType> type;      // that floating-point tensors are written in; none: own
  uint64_t shard_bytes = 5'000'000'000;    // largest file; a larger tensor has one of its own
  Metadata metadata = {{"format", "pt"}};  // the mark that `transformers` asks for
  // What the file holds instead of a tensor, of the same shape and type; called when its turn
  // comes, so that no more than one such copy is in memory. Empty: the tensor itself.
  std::function<at::Tensor(const std::string& name, const at::Tensor& tensor)> in_file = {};
};

// Writes model.safetensors, or if that were above shard_bytes model-00001-of-00003.safetensors and
// so on with model.safetensors.index.json, into the folder, which must exist: what `transformers`
// and WeightFiles open. No more than one tensor is copied at a time. Throws Error like
// write_safetensors, and if the folder holds the weights of another export that readers would
// prefer.
void export_weights(const std::filesystem::path& folder, const NamedTensors& tensors,
                    const ExportOptions& options = {});

}  // namespace natslm::models
