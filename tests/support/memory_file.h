// A file that lives in memory: for readers that want a path, tried thousands of times.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <string_view>

#include "natslm/base/error.h"

namespace natslm {

class MemoryFile {
 public:
  MemoryFile() : file_(::memfd_create("natslm", MFD_CLOEXEC)) {
    NATSLM_CHECK(file_ >= 0, "cannot make a file in memory");
  }
  explicit MemoryFile(std::string_view contents) : MemoryFile() { set(contents); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { ::close(file_); }

  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(file_); }
  // Nothing may still map the file.
  void set(std::string_view contents) const {
    const bool done =
        ::ftruncate(file_, 0) == 0 && ::pwrite(file_, contents.data(), contents.size(), 0) ==
                                          static_cast<ssize_t>(contents.size());
    NATSLM_CHECK(done, "cannot write a file in memory");
  }

 private:
  int file_;
};

}  // namespace natslm
