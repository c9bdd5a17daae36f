// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "natslm/base/error.h"

namespace natslm {
namespace {

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  const std::string file = path.string();
  // Without O_NONBLOCK a pipe in place of the file would be waited for.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  NATSLM_CHECK(fd >= 0, file, ": cannot open: ", std::strerror(errno));
  struct stat status = {};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd);
    fail(file, ": is not a regular file");
  }
  size_ = static_cast<uint64_t>(status.st_size);
  if (size_ > 0) {
    void* address =
        ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (address == MAP_FAILED) {
      const int error = errno;
      ::close(fd);
      fail(file, ": cannot map ", size_, " bytes: ", std::strerror(error));
    }
    data_ = static_cast<std::byte*>(address);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

void MappedFile::will_need(std::span<const std::byte> range) const {
  if (range.empty()) return;
  const size_t begin = (range.data() - data_) / page_bytes() * page_bytes();
  ::madvise(data_ + begin, range.data() + range.size() - (data_ + begin), MADV_WILLNEED);
}

void MappedFile::release(std::span<const std::byte> range) const {
  const size_t page = page_bytes(), first = range.data() - data_;
  const size_t begin = (first + page - 1) / page * page, end = (first + range.size()) / page * page;
  if (end > begin) ::madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace natslm
