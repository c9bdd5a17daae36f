// GGUF model files, versions 2 and 3: typed metadata (the model's sizes, its vocabulary) and a
// table of tensors, plain or quantised, whose bytes are mapped, not read. No arithmetic here:
// kernels/dequantize.h makes numbers of the bytes.
//
// A file is checked completely when it is opened: afterwards every value and tensor lies inside the
// file, names are unique, and tensors do not overlap. What a getter is asked for and the file does
// not hold is an Error of one line that names file, key, what was found and what was expected.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
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

#include "natslm/base/mapped_file.h"
#include "natslm/base/weight_type.h"

namespace natslm {

class GgufFile {
 public:
  enum class ValueType : uint32_t {
    kU8,
    kI8,
    kU16,
    kI16,
    kU32,
    kI32,
    kF32,
    kBool,
    kString,
    kArray,
    kU64,
    kI64,
    kF64
  };

  // One metadata value: where it lies in the file. The typed getters below decode it.
  struct Value {
    ValueType type = ValueType::kU8;
    ValueType element = ValueType::kU8;  // of an array; may be kArray: arrays can nest
    uint64_t count = 1;                  // elements of an array
    std::span<const std::byte> bytes;    // of the value, or of the array's elements
    bool is_array() const { return type == ValueType::kArray; }
  };

  struct Tensor {
    std::string_view name;
    WeightType type = WeightType::kF32;
    std::vector<int64_t> shape;  // row-major, outermost first (the file has it innermost first)
    std::span<const std::byte> bytes;  // in the file; as long as type and shape say
  };

  // Maps the file and checks it. Throws Error. Copies of the object share the mapping.
  static GgufFile open(const std::filesystem::path& path);

  // Views (string_view, span) returned by any function here live as long as the GgufFile or a copy.
  const std::filesystem::path& path() const { return file_->path(); }
  const std::shared_ptr<const MappedFile>& mapped() const { return file_; }
  uint32_t version() const { return version_; }

  // ---- metadata ----
  // nullptr if there is no such key.
  const Value* find(std::string_view key) const;
  bool contains(std::string_view key) const { return find(key) != nullptr; }
  const std::map<std::string_view, Value>& metadata() const { return metadata_; }

  // Throw Error if the key is missing or its value of another kind. Integers may be stored in any
  // integer type that the value fits; real numbers as F32 or F64.
  bool get_bool(std::string_view key) const;
  uint32_t get_u32(std::string_view key) const;
  int64_t get_i64(std::string_view key) const;
  float get_f32(std::string_view key) const;
  std::string_view get_string(std::string_view key) const;
  std::vector<std::string_view> get_strings(std::string_view key) const;
  std::vector<int32_t> get_i32s(std::string_view key) const;
  std::vector<float> get_f32s(std::string_view key) const;
  std::vector<bool> get_bools(std::string_view key) const;

  // The same, with what a missing key means. A value of another kind is an Error still.
  bool get_bool(std::string_view key, bool missing) const;
  uint32_t get_u32(std::string_view key, uint32_t missing) const;
  int64_t get_i64(std::string_view key, int64_t missing) const;
  float get_f32(std::string_view key, float missing) const;
  std::string_view get_string(std::string_view key, std::string_view missing) const;

  // Elements of an array of arrays. Throws Error if the value is not one.
  std::vector<Value> get_arrays(std::string_view key) const;

  // ---- tensors ----
  std::span<const Tensor> tensors() const { return tensors_; }  // in the order of their bytes
  const Tensor* find_tensor(std::string_view name) const;       // nullptr if there is none
  const Tensor& tensor(std::string_view name) const;            // throws Error if there is none

 private:
  class Reader;
  GgufFile() = default;

  std::shared_ptr<const MappedFile> file_;
  uint32_t version_ = 0;
  std::map<std::string_view, Value> metadata_;
  std::vector<Tensor> tensors_;
  std::map<std::string_view, size_t> tensor_index_;
};

}  // namespace natslm
