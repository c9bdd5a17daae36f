// Files that are whole or not there: bytes go to `<path>.tmp`, are fsynced, and are renamed over
// `path` only by commit(). A process killed at any moment leaves the old file as it was; the next
// writer of the same path takes over the `.tmp` a killed one left. Errors (disk full, no
// permission, a folder that is not there) are natslm::Error with the path and the system's reason.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace natslm {

class AtomicFile {
 public:
  // The folder must exist. A symbolic link is followed, anything but a regular file refused. Two
  // writers of one path at the same time: the second one gets an Error.
  explicit AtomicFile(const std::filesystem::path& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();  // without commit(): removes the temporary file

  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  // Replaces bytes already written, for a header whose numbers are known at the end.
  void overwrite(uint64_t offset, const void* data, size_t bytes);
  uint64_t written() const { return flushed_ + buffer_.size(); }
  // Flushes, fsyncs, renames, and fsyncs the folder. Nothing can be written afterwards.
  void commit();

 private:
  void flush();
  void put(const void* data, size_t bytes, uint64_t offset);
  [[noreturn]] void failed(const char* action, int error) const;

  std::filesystem::path path_, temporary_;
  int file_ = -1;
  uint64_t flushed_ = 0;
  std::vector<char> buffer_;
};

// The whole of a small file at once.
void write_atomically(const std::filesystem::path& path, std::string_view contents);

// For a folder made of several files (a checkpoint): write it under a temporary name, then
// rename_durably(temporary, final). `to` must not exist, or be an empty folder. sync_tree fsyncs
// every regular file and folder below `folder`, itself included.
void sync_tree(const std::filesystem::path& folder);
void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to);

// All bytes of a regular file; throws Error with path and reason.
std::string read_file(const std::filesystem::path& path);

}  // namespace natslm
