// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/corpus.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string_view>
#include <system_error>
#include <utility>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/packed_tokens.h"

namespace natslm::data {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBlockBytes = size_t{4} << 20;
// A line that is longer is no JSON line: better an error than all memory.
constexpr size_t kMostLineBytes = size_t{1} << 30;

TextSource source_of(const fs::path& path, std::string name) {
  std::error_code error;
  const uint64_t bytes = fs::file_size(path, error);
  NATSLM_CHECK(!error, "cannot read ", path.string(), ": ", error.message());
  const bool json_lines = path.extension() == ".jsonl";
  return {path, std::move(name), json_lines, 0, bytes};
}

std::ifstream open(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  NATSLM_CHECK(file, "cannot open ", path.string(), ": ",
               std::error_code(errno, std::generic_category()).message());
  return file;
}

bool looks_like_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  char head[8192];
  file.read(head, sizeof head);
  const auto bytes = static_cast<size_t>(file.gcount());
  return bytes > 0 && std::find(head, head + bytes, '\0') == head + bytes &&
         !is_packed_tokens(path);
}

bool hidden(const fs::path& path) {
  return path.filename().string().starts_with('.');
}

void search_folder(const fs::path& folder, Corpus& corpus) {
  std::vector<TextSource> found;
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, fs::directory_options::skip_permission_denied,
                                         error);
  NATSLM_CHECK(!error, "cannot read folder ", folder.string(), ": ", error.message());
  for (const fs::recursive_directory_iterator end; entry != end; entry.increment(error)) {
    NATSLM_CHECK(!error, "cannot read folder ", folder.string(), ": ", error.message());
    std::error_code ignored;
    if (hidden(entry->path())) {
      if (entry->is_directory(ignored)) entry.disable_recursion_pending();
      continue;
    }
    if (!entry->is_regular_file(ignored)) continue;
    if (!looks_like_text(entry->path())) {
      ++corpus.skipped_files;
      continue;
    }
    found.push_back(
        source_of(entry->path(), entry->path().lexically_relative(folder).generic_string()));
  }
  std::ranges::sort(found, {}, &TextSource::name);
  std::ranges::move(found, std::back_inserter(corpus.sources));
}

uint64_t hash_of(std::string_view name) {
  uint64_t hash = 0;
  for (const char c : name) hash = mix64(hash ^ static_cast<unsigned char>(c));
  return hash;
}

// The first byte after the line that byte `at` is in, at most `end`.
uint64_t next_line(const TextSource& source, uint64_t at) {
  if (at == source.begin) return at;
  std::ifstream file = open(source.path);
  file.seekg(static_cast<std::streamoff>(at - 1));
  char c = 0;
  while (at <= source.end && file.get(c)) {
    if (c == '\n') return at;
    ++at;
  }
  return source.end;
}

}  // namespace

uint64_t Corpus::bytes() const {
  return std::accumulate(sources.begin(), sources.end(), uint64_t{0},
                         [](uint64_t sum, const TextSource& s) { return sum + (s.end - s.begin); });
}

Corpus find_text(const std::vector<fs::path>& paths) {
  NATSLM_CHECK(!paths.empty(), "no text was given; name a file or a folder");
  Corpus corpus;
  std::string looked_at;
  for (const fs::path& path : paths) {
    looked_at += (looked_at.empty() ? "" : ", ") + path.string();
    std::error_code error;
    NATSLM_CHECK(fs::exists(path, error), "no text at ", path.string(), ": no such file or folder");
    if (fs::is_directory(path, error)) {
      search_folder(path, corpus);
      continue;
    }
    NATSLM_CHECK(fs::is_regular_file(path, error), "cannot read ", path.string(),
                 ": neither a file nor a folder");
    NATSLM_CHECK(!is_packed_tokens(path), path.string(),
                 " holds packed tokens, not text; it cannot be mixed with text");
    TextSource source = source_of(path, path.filename().string());
    if (source.end > 0) corpus.sources.push_back(std::move(source));
  }
  NATSLM_CHECK(!corpus.sources.empty(), "no text in ", looked_at, ": ",
               corpus.skipped_files > 0
                   ? std::to_string(corpus.skipped_files) + " binary or empty files were skipped"
                   : std::string("nothing but empty files or folders"),
               "; name a text file, a .jsonl, or a folder with some");
  return corpus;
}

CorpusSplit split_corpus(const Corpus& corpus, double share) {
  NATSLM_CHECK(share > 0 && share <= 0.5, "a validation share of ", share,
               " is not possible: above 0, at most 0.5");
  const double target = share * static_cast<double>(corpus.bytes());
  std::vector<size_t> order(corpus.sources.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, {}, [&](size_t i) { return hash_of(corpus.sources[i].name); });
  std::vector<bool> held(corpus.sources.size());
  double taken = 0;
  for (const size_t i : order) {
    const TextSource& source = corpus.sources[i];
    const auto bytes = static_cast<double>(source.end - source.begin);
    // A quarter too much is better than a file cut in two.
    if (taken >= target || taken + bytes > 1.25 * target) continue;
    held[i] = true;
    taken += bytes;
  }
  CorpusSplit split;
  split.train.skipped_files = corpus.skipped_files;
  for (size_t i = 0; i < order.size(); ++i) {
    (held[i] ? split.validation : split.train).sources.push_back(corpus.sources[i]);
  }
  // Less than half of what was asked for: no file of the right size.
  if (taken < 0.5 * target) {
    const auto largest = std::ranges::max_element(
        split.train.sources, {}, [](const TextSource& s) { return s.end - s.begin; });
    const auto bytes = static_cast<double>(largest->end - largest->begin);
    const double wanted = std::min(target - taken, 0.5 * bytes);
    const uint64_t cut = next_line(*largest, largest->end - static_cast<uint64_t>(wanted));
    if (cut > largest->begin && cut < largest->end) {
      split.validation.sources.push_back(*largest);
      split.validation.sources.back().begin = cut;
      largest->end = cut;
    }
  }
  NATSLM_CHECK(!split.validation.sources.empty(), "the text cannot be split: its ", corpus.bytes(),
               " bytes have no line to begin the last ", 100 * share,
               " % with; give validation text of its own");
  return split;
}

class TextStream::Impl {
 public:
  explicit Impl(const Corpus& corpus) : corpus_(corpus) {}

  bool next(std::string& block, bool& document_ends) {
    block.clear();
    document_ends = false;
    while (number_ < corpus_.sources.size()) {
      const TextSource& source = corpus_.sources[number_];
      if (!file_.is_open()) {
        file_ = open(source.path);
        file_.seekg(static_cast<std::streamoff>(source.begin));
        at_ = source.begin;
        line_ = 0;
      }
      if (!source.json_lines) {
        read_block(source, block);
        document_ends = at_ >= source.end;
        if (document_ends) close();
        return true;
      }
      while (at_ < source.end) {
        if (!read_line(source)) continue;
        block = std::move(document_);
        document_ends = true;
        return true;
      }
      close();
    }
    return false;
  }

  uint64_t bytes_read() const { return read_; }

 private:
  void close() {
    file_.close();
    file_.clear();
    ++number_;
  }

  void shorter(const TextSource& source) const {
    fail("cannot read ", source.path.string(), " beyond byte ", at_,
         ": it has become shorter or the disk fails");
  }

  void read_block(const TextSource& source, std::string& block) {
    const uint64_t wanted = std::min<uint64_t>(kBlockBytes, source.end - at_);
    block.resize(wanted);
    file_.read(block.data(), static_cast<std::streamsize>(wanted));
    if (static_cast<uint64_t>(file_.gcount()) != wanted) shorter(source);
    at_ += wanted;
    read_ += wanted;
  }

  // False for a blank line. Otherwise document_ is the line's text.
  bool read_line(const TextSource& source) {
    std::string line;
    ++line_;
    const auto here = [&] {
      // Lines are counted from where this part of the file begins.
      return source.path.string() +
             (source.begin > 0 ? " (from byte " + std::to_string(source.begin) + ")" : "") +
             " line " + std::to_string(line_);
    };
    if (!std::getline(file_, line)) shorter(source);
    const uint64_t bytes = line.size() + (file_.eof() ? 0 : 1);
    at_ += bytes;
    read_ += bytes;
    NATSLM_CHECK(line.size() <= kMostLineBytes, here(), " has ", line.size(), " bytes: at most ",
                 kMostLineBytes);
    if (at_ == bytes && line.starts_with("\xEF\xBB\xBF")) line.erase(0, 3);
    if (line.find_first_not_of(" \t\r") == std::string::npos) return false;
    try {
      const nlohmann::json value = nlohmann::json::parse(line);
      NATSLM_CHECK(value.is_object(), here(), " is not a JSON object");
      const auto text = value.find("text");
      NATSLM_CHECK(text != value.end(), here(), " has no member \"text\"");
      NATSLM_CHECK(text->is_string(), here(), ": its member \"text\" is not a string");
      document_ = text->get<std::string>();
    } catch (const nlohmann::json::parse_error& error) {
      fail(here(), " is not valid JSON at byte ", error.byte,
           "; a line must be one whole object in UTF-8");
    }
    return true;
  }

  Corpus corpus_;
  size_t number_ = 0;  // of the source
  std::ifstream file_;
  uint64_t at_ = 0;  // byte of that file
  uint64_t line_ = 0;
  uint64_t read_ = 0;
  std::string document_;
};

TextStream::TextStream(const Corpus& corpus) : impl_(std::make_unique<Impl>(corpus)) {}
TextStream::~TextStream() = default;
TextStream::TextStream(TextStream&&) noexcept = default;
bool TextStream::next(std::string& block, bool& document_ends) {
  return impl_->next(block, document_ends);
}
uint64_t TextStream::bytes_read() const {
  return impl_->bytes_read();
}

}  // namespace natslm::data
