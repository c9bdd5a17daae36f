// GGUF files for tests, right or wrong in any field.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "natslm/base/gguf.h"

namespace natslm {

// The bytes of a number, little-endian.
template <class T>
requires std::is_arithmetic_v<T> std::string raw(T number) {
  return {reinterpret_cast<const char*>(&number), sizeof(T)};
}
inline std::string raw(std::string_view text) {
  return raw(uint64_t{text.size()}).append(text);
}

class GgufBuilder {
 public:
  using ValueType = GgufFile::ValueType;
  struct Tensor {
    std::string name;
    std::vector<uint64_t> sizes;  // innermost first, as in the file
    uint32_t type = 0;
    uint64_t offset = 0;
  };

  uint32_t version = 3;
  uint64_t alignment = 32;  // what the data is padded to, whatever the metadata says
  std::string data;

  GgufBuilder& value(std::string_view key, ValueType type, const std::string& bytes) {
    metadata_ += raw(key) + raw(static_cast<uint32_t>(type)) + bytes;
    ++entries;
    return *this;
  }
  GgufBuilder& array(std::string_view key, ValueType element, uint64_t count,
                     const std::string& bytes) {
    return value(key, ValueType::kArray, raw(static_cast<uint32_t>(element)) + raw(count) + bytes);
  }
  GgufBuilder& tensor(const Tensor& t) {
    table_ += raw(t.name) + raw(static_cast<uint32_t>(t.sizes.size()));
    for (const uint64_t size : t.sizes) table_ += raw(size);
    table_ += raw(t.type) + raw(t.offset);
    ++tensors;
    return *this;
  }
  std::string bytes() const {
    std::string file = "GGUF" + raw(version) + raw(tensors) + raw(entries) + metadata_ + table_;
    while (file.size() % alignment != 0) file += '\0';
    return file + data;
  }

  uint64_t tensors = 0, entries = 0;  // what the header claims

 private:
  std::string metadata_, table_;
};

}  // namespace natslm
