// Where text comes from: files, folders, .jsonl; which of it validates; and text as a stream of
// blocks that never holds a whole corpus in memory. Packed token files are packed_tokens.h.
//
// A file named by the user is always taken, as it is, byte for byte. A folder is searched
// recursively (links to folders are not followed) for files that are text: not hidden, not empty,
// no NUL byte in their first 8 KiB, not a packed token file; whatever their extension. A file whose
// name ends in .jsonl holds a document a line, in the member "text" of a JSON object; any other
// file is one document. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace natslm::data {

// Bytes [begin, end) of a file. In a .jsonl both stand at the beginning of a line.
struct TextSource {
  std::filesystem::path path;
  std::string name;  // the path below the folder it was found in, with '/'; a named file: its name
  bool json_lines = false;
  uint64_t begin = 0, end = 0;
};

struct Corpus {
  std::vector<TextSource> sources;  // sorted by name within each path given by the user
  int64_t skipped_files = 0;        // in folders: binary, empty or unreadable ones
  uint64_t bytes() const;
};

// Throws Error for a path that does not exist, a packed file, and when no text at all is found.
Corpus find_text(const std::vector<std::filesystem::path>& paths);

struct CorpusSplit {
  Corpus train, validation;
};

// Holds back about `share` (in (0, 0.5]) of the bytes. Whole files, taken in the order of a hash of
// their names, so that the split depends neither on where the folder lies nor on the file system's
// order. When no file is small enough for that (a single file, a few books): the end of the largest
// file, from the next beginning of a line on.
CorpusSplit split_corpus(const Corpus& corpus, double share);

// The documents of a corpus in blocks of at most some megabytes, one document after the other.
class TextStream {
 public:
  explicit TextStream(const Corpus& corpus);
  ~TextStream();
  TextStream(TextStream&&) noexcept;
  // The next block, cut at any byte; false when there is none left. `document_ends`: the block is
  // the last one of its document (the block may then be empty). Throws Error with path, line and
  // reason.
  bool next(std::string& block, bool& document_ends);
  uint64_t bytes_read() const;  // of Corpus::bytes()

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace natslm::data
