// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/atomic_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "natslm/base/error.h"

namespace natslm {
namespace fs = std::filesystem;

namespace {

constexpr size_t kBufferBytes = 1 << 20;

[[noreturn]] void fail_with(const char* action, const fs::path& path, int error) {
  const char* remedy = error == ENOSPC || error == EDQUOT
                           ? "; free some space or choose another folder"
                       : error == ENOENT ? "; does its folder exist?"
                                         : "";
  fail("cannot ", action, " ", path.string(), ": ", std::strerror(error), remedy);
}

// A descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int file) : file_(file) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (file_ >= 0) ::close(file_);
  }
  int get() const { return file_; }

 private:
  int file_;
};

void sync_path(const fs::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) fail_with("open", path, errno);
  // Some file systems cannot fsync a folder (EINVAL): there the rename is as durable as it gets.
  if (::fsync(file.get()) != 0 && errno != EINVAL) fail_with("sync", path, errno);
}

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

// Opens and locks the temporary file, which another process may be renaming at this moment.
int open_temporary(const fs::path& path) {
  for (;;) {
    const int file = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0) fail_with("create", path, errno);
    if (::flock(file, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(file);
      fail("cannot write ", path.string(),
           ": another process is writing it; wait or choose another name");
    }
    // The lock is on what was opened. Had its owner renamed it in between, this would be the
    // finished file, which must not be touched.
    struct stat opened {
    }, named{};
    if (::fstat(file, &opened) == 0 && ::stat(path.c_str(), &named) == 0 &&
        opened.st_ino == named.st_ino && opened.st_dev == named.st_dev) {
      if (::ftruncate(file, 0) == 0) return file;
      const int error = errno;
      ::close(file);
      fail_with("truncate", path, error);
    }
    ::close(file);
  }
}

}  // namespace

AtomicFile::AtomicFile(const fs::path& path) : path_(path) {
  std::error_code error;
  if (fs::is_symlink(path_, error)) {
    const fs::path target = fs::weakly_canonical(path_, error);
    if (!error) path_ = target;
  }
  NATSLM_CHECK(!fs::exists(path_, error) || fs::is_regular_file(path_, error), "cannot write ",
               path.string(), ": it exists and is not a regular file; choose another name");
  temporary_ = path_;
  temporary_ += ".tmp";
  file_ = open_temporary(temporary_);
  buffer_.reserve(kBufferBytes);
}

AtomicFile::~AtomicFile() {
  if (file_ < 0) return;
  ::unlink(temporary_.c_str());
  ::close(file_);
}

void AtomicFile::failed(const char* action, int error) const {
  fail_with(action, path_, error);
}

void AtomicFile::put(const void* data, size_t bytes, uint64_t offset) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t done = ::pwrite(file_, at, bytes, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) failed("write", done < 0 ? errno : ENOSPC);
    at += done;
    offset += static_cast<uint64_t>(done);
    bytes -= static_cast<size_t>(done);
  }
}

void AtomicFile::flush() {
  put(buffer_.data(), buffer_.size(), flushed_);
  flushed_ += buffer_.size();
  buffer_.clear();
}

void AtomicFile::write(const void* data, size_t bytes) {
  NATSLM_ASSERT(file_ >= 0);
  if (buffer_.size() + bytes > kBufferBytes) flush();
  if (bytes > kBufferBytes) {
    put(data, bytes, flushed_);
    flushed_ += bytes;
    return;
  }
  const char* at = static_cast<const char*>(data);
  buffer_.insert(buffer_.end(), at, at + bytes);
}

void AtomicFile::overwrite(uint64_t offset, const void* data, size_t bytes) {
  NATSLM_ASSERT(file_ >= 0 && offset + bytes <= written());
  flush();
  put(data, bytes, offset);
}

void AtomicFile::commit() {
  NATSLM_ASSERT(file_ >= 0);
  flush();
  if (::fsync(file_) != 0) failed("sync", errno);
  // Renamed while still open: the lock keeps others off the name until it is the finished file.
  if (::rename(temporary_.c_str(), path_.c_str()) != 0)
    failed("rename the temporary file to", errno);
  const int file = std::exchange(file_, -1);
  if (::close(file) != 0) failed("close", errno);
  sync_path(folder_of(path_));
}

void write_atomically(const fs::path& path, std::string_view contents) {
  AtomicFile file(path);
  file.write(contents);
  file.commit();
}

void sync_tree(const fs::path& folder) {
  std::error_code error;
  for (fs::recursive_directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->is_regular_file(error) || entry->is_directory(error)) sync_path(entry->path());
  }
  NATSLM_CHECK(!error, "cannot read folder ", folder.string(), ": ", error.message());
  sync_path(folder);
}

void rename_durably(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) {
    const int error = errno;
    fail("cannot rename ", from.string(), " to ", to.string(), ": ", std::strerror(error));
  }
  sync_path(folder_of(to));
}

std::string read_file(const fs::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) fail_with("open", path, errno);
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) fail_with("read", path, errno);
  NATSLM_CHECK(!S_ISDIR(info.st_mode), "cannot read ", path.string(),
               ": it is a folder, a file is needed");
  std::string contents(static_cast<size_t>(std::max<off_t>(info.st_size, 0)) + 1, '\0');
  size_t size = 0;
  for (;;) {
    // One byte more than the size said, so that a whole file needs one read and the end another.
    if (size == contents.size()) contents.resize(2 * size);
    const ssize_t got = ::read(file.get(), contents.data() + size, contents.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_with("read", path, errno);
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  contents.resize(size);
  return contents;
}

}  // namespace natslm
