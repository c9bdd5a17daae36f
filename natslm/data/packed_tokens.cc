// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/packed_tokens.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/byte_level_bpe.h"

namespace natslm::data {
namespace {

namespace fs = std::filesystem;
static_assert(std::endian::native == std::endian::little, "packed files are little-endian");

constexpr std::array<char, 8> kMagic{'N', 'A', 'T', 'S', 'T', 'O', 'K', '\n'};
constexpr uint32_t kVersion = 1;

struct Header {
  std::array<char, 8> magic = kMagic;
  uint32_t version = kVersion;
  uint32_t width = 0;  // bytes of an id: 2 or 4
  uint64_t vocabulary = 0;
  uint64_t count = 0;
  uint64_t fingerprint = 0;  // of the tokenizer
  uint64_t tokens_checksum = 0;
  uint64_t reserved = 0;
  uint64_t header_checksum = 0;  // of the bytes before it
};
static_assert(sizeof(Header) == 64);

uint64_t header_checksum(const Header& header) {
  std::array<uint64_t, 7> words;
  std::memcpy(words.data(), &header, sizeof words);
  uint64_t sum = 0;
  for (const uint64_t word : words) sum = mix64(sum ^ word);
  return sum;
}

uint32_t width_of(int64_t vocabulary) {
  return vocabulary <= 65536 ? 2 : 4;
}

}  // namespace

// Four independent lanes over 32-byte stripes, so that memory and not the multiplier is the limit.
// Bytes may come in any portions: what does not fill a stripe is kept.
void TokenChecksum::add(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  size_ += bytes;
  if (kept_ > 0) {
    const size_t fits = std::min(bytes, sizeof kept_bytes_ - kept_);
    std::memcpy(kept_bytes_ + kept_, at, fits);
    kept_ += fits;
    at += fits;
    bytes -= fits;
    if (kept_ < sizeof kept_bytes_) return;
    stripe(kept_bytes_);
    kept_ = 0;
  }
  for (; bytes >= sizeof kept_bytes_; at += sizeof kept_bytes_, bytes -= sizeof kept_bytes_)
    stripe(at);
  std::memcpy(kept_bytes_, at, bytes);
  kept_ = bytes;
}

void TokenChecksum::stripe(const char* at) {
  uint64_t word[4];
  std::memcpy(word, at, sizeof word);
  for (int i = 0; i < 4; ++i) {
    lane_[i] = std::rotl((lane_[i] ^ word[i]) * 0x9E3779B97F4A7C15u, 29);
  }
}

uint64_t TokenChecksum::value() const {
  TokenChecksum last = *this;
  std::memset(last.kept_bytes_ + last.kept_, 0, sizeof last.kept_bytes_ - last.kept_);
  last.stripe(last.kept_bytes_);
  uint64_t sum = size_;
  for (const uint64_t lane : last.lane_) sum = mix64(sum ^ lane);
  return sum;
}

bool is_packed_tokens(const fs::path& path) {
  std::array<char, 8> head{};
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return false;
  const ssize_t got = ::read(file, head.data(), head.size());
  ::close(file);
  return got == static_cast<ssize_t>(head.size()) && head == kMagic;
}

struct PackedTokens::Mapped {
  fs::path path;
  Header header;
  void* memory = MAP_FAILED;
  size_t bytes = 0;

  explicit Mapped(const fs::path& p) : path(p) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) failed("open", errno);
    struct stat info {};
    if (::fstat(file, &info) == 0 && S_ISREG(info.st_mode))
      bytes = static_cast<size_t>(info.st_size);
    if (bytes > 0) memory = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    const int error = errno;
    ::close(file);
    NATSLM_CHECK(bytes >= sizeof header, path.string(), " is no packed token file: ", bytes,
                 " bytes, its header has ", sizeof header);
    if (memory == MAP_FAILED) failed("map", error);
    std::memcpy(&header, memory, sizeof header);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() {
    if (memory != MAP_FAILED) ::munmap(memory, bytes);
  }

  const char* tokens() const { return static_cast<const char*>(memory) + sizeof header; }
  [[noreturn]] void failed(const char* action, int error) const {
    fail("cannot ", action, " ", path.string(), ": ",
         std::error_code(error, std::generic_category()).message());
  }
};

PackedTokens::PackedTokens(const fs::path& path, bool verify) {
  auto mapped = std::make_shared<Mapped>(path);
  const Header& header = mapped->header;
  const char* remedy = "; pack the text again";
  NATSLM_CHECK(header.magic == kMagic, path.string(), " is no packed token file");
  NATSLM_CHECK(header.version == kVersion, path.string(), " is a packed token file of version ",
               header.version, ", this program reads version ", kVersion, remedy);
  NATSLM_CHECK(header_checksum(header) == header.header_checksum, path.string(),
               " has a damaged header", remedy);
  NATSLM_CHECK(header.vocabulary > 0 && header.vocabulary <= uint64_t{kMostTokens} &&
                   header.width == width_of(static_cast<int64_t>(header.vocabulary)),
               path.string(), " has an impossible header", remedy);
  const uint64_t held = mapped->bytes - sizeof header;
  NATSLM_CHECK(held % header.width == 0 && held / header.width == header.count, path.string(),
               " has ", held, " bytes of tokens, its header says ", header.count, " tokens of ",
               header.width, " bytes: truncated?", remedy);
  if (verify) {
    TokenChecksum checksum;
    checksum.add(mapped->tokens(), held);
    NATSLM_CHECK(checksum.value() == header.tokens_checksum, path.string(),
                 " is damaged: its tokens do not fit their checksum", remedy);
  }
  mapped_ = std::move(mapped);
}

const fs::path& PackedTokens::path() const {
  return mapped_->path;
}
int32_t PackedTokens::vocabulary() const {
  return static_cast<int32_t>(mapped_->header.vocabulary);
}
uint64_t PackedTokens::tokenizer_fingerprint() const {
  return mapped_->header.fingerprint;
}
int64_t PackedTokens::size() const {
  return static_cast<int64_t>(mapped_->header.count);
}

void PackedTokens::read(int64_t begin, int64_t count, int32_t* out) const {
  NATSLM_CHECK(begin >= 0 && count >= 0 && count <= size() - begin, path().string(), " has ",
               size(), " tokens; ", count, " from ", begin, " on were asked for");
  const int32_t limit = vocabulary();
  const auto convert = [&]<class Id>(Id) {
    Id id;
    const char* at = mapped_->tokens() + begin * sizeof(Id);
    for (int64_t i = 0; i < count; ++i, at += sizeof(Id)) {
      std::memcpy(&id, at, sizeof id);
      NATSLM_CHECK(id < static_cast<uint32_t>(limit), path().string(), " is damaged: token ",
                   begin + i, " has id ", id, ", its vocabulary ", limit, "; pack the text again");
      out[i] = static_cast<int32_t>(id);
    }
  };
  mapped_->header.width == 2 ? convert(uint16_t{}) : convert(uint32_t{});
}

PackedTokensWriter::PackedTokensWriter(const fs::path& path, int32_t vocabulary,
                                       uint64_t fingerprint)
    : file_(path), vocabulary_(vocabulary), fingerprint_(fingerprint) {
  NATSLM_CHECK(vocabulary > 0 && vocabulary <= kMostTokens, "a vocabulary of ", vocabulary,
               " cannot be packed: 1 to ", kMostTokens);
  const Header empty{};
  file_.write(&empty, sizeof empty);
}

void PackedTokensWriter::append(const int32_t* ids, int64_t count) {
  std::vector<uint16_t> narrow;
  for (int64_t i = 0; i < count; ++i) {
    NATSLM_CHECK(ids[i] >= 0 && ids[i] < vocabulary_, "token id ", ids[i],
                 " is outside the vocabulary of ", vocabulary_);
  }
  const void* data = ids;
  if (width_of(vocabulary_) == 2) {
    narrow.assign(ids, ids + count);
    data = narrow.data();
  }
  const size_t bytes = static_cast<size_t>(count) * width_of(vocabulary_);
  file_.write(data, bytes);
  checksum_.add(data, bytes);
  count_ += count;
}

void PackedTokensWriter::commit() {
  Header header;
  header.width = width_of(vocabulary_);
  header.vocabulary = static_cast<uint64_t>(vocabulary_);
  header.count = static_cast<uint64_t>(count_);
  header.fingerprint = fingerprint_;
  header.tokens_checksum = checksum_.value();
  header.header_checksum = header_checksum(header);
  file_.overwrite(0, &header, sizeof header);
  file_.commit();
}

PackSummary pack_corpus(const Corpus& corpus, const Tokenizer& tokenizer, const fs::path& path,
                        const PackProgress& progress) {
  PackedTokensWriter writer(path, tokenizer.vocabulary(), tokenizer.fingerprint());
  TextStream stream(corpus);
  PackSummary summary;
  std::string block, pending;
  std::vector<int32_t> ids;
  bool document_ends = false;
  while (stream.next(block, document_ends)) {
    summary.bytes += block.size();
    pending += block;
    const size_t ready = document_ends ? pending.size() : tokenizer.stable_prefix(pending);
    ids.clear();
    tokenizer.encode_to(std::string_view(pending).substr(0, ready), ids);
    pending.erase(0, ready);
    if (document_ends) {
      if (tokenizer.end_of_text() >= 0) ids.push_back(tokenizer.end_of_text());
      ++summary.documents;
    }
    writer.append(ids.data(), static_cast<int64_t>(ids.size()));
    if (progress && !progress(stream.bytes_read(), corpus.bytes())) {
      fail("tokenising was stopped; ", path.string(), " was not written");
    }
  }
  summary.tokens = writer.size();
  writer.commit();
  return summary;
}

}  // namespace natslm::data
