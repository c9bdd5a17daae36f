// A whole file as memory, without reading it first: what is never touched is never read, and pages
// come from (and go back to) the system's file cache, so a model's file costs no memory of its own.
// The mapping is private: writing to it changes memory, never the file. The file must not be cut
// short by others while it is mapped: reading what is gone then ends the process (SIGBUS).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace natslm {

class MappedFile {
 public:
  // Throws Error with path and reason unless `path` is a regular file that can be mapped. An empty
  // file is an empty span.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::filesystem::path& path() const { return path_; }
  uint64_t size() const { return size_; }
  std::span<const std::byte> bytes() const { return {data_, static_cast<size_t>(size_)}; }
  // For those who hand out tensors over the mapping; page-aligned.
  std::byte* data() const { return data_; }
  // Tells the system that these bytes will soon be read from front to back. A hint, no error.
  void will_need(std::span<const std::byte> range) const;
  // Gives the pages that lie wholly in the range back to the system: reading them again brings them
  // back from the file, so anything written to them is lost.
  void release(std::span<const std::byte> range) const;

 private:
  std::filesystem::path path_;
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace natslm
