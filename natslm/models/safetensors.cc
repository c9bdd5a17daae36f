// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"

namespace natslm::models {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr size_t kMaxDims = 16;
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // products of sizes stay far from overflow
constexpr uint64_t kAlignment = 64;  // of the data, so that mapped tensors are aligned

struct TypeName {
  std::string_view name;
  at::ScalarType type;
};
constexpr std::array<TypeName, 7> kTypes = {{{"F32", at::kFloat},
                                             {"BF16", at::kBFloat16},
                                             {"F16", at::kHalf},
                                             {"F64", at::kDouble},
                                             {"I64", at::kLong},
                                             {"I32", at::kInt},
                                             {"U8", at::kByte}}};

std::string type_list() {
  std::vector<std::string_view> names;
  for (const TypeName& t : kTypes) names.push_back(t.name);
  return list(names);
}

std::string shape_text(at::IntArrayRef shape) {
  return "[" + list(shape) + "]";
}

// A name from a file as part of a one-line message: control characters escaped, long ones cut.
std::string in_quotes(std::string_view name) {
  constexpr size_t kLongest = 120;
  std::string text = "'";
  for (const char c : name.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      constexpr std::string_view kHex = "0123456789abcdef";
      text += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      text += c;
    }
  }
  return text + (name.size() > kLongest ? "...'" : "'");
}

// What a damaged file can make of a JSON value: printed short.
std::string brief(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  constexpr size_t kLongest = 60;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

// Parses the header and refuses a name given twice: the later one would silently win.
json parse_header(const std::string& file, std::string_view header) {
  std::set<std::string> names;   // of the tensors
  std::set<std::string> fields;  // of the tensor being read
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event != json::parse_event_t::key) return true;
    const auto& key = parsed.get_ref<const std::string&>();
    if (depth == 1) {
      NATSLM_CHECK(names.insert(key).second, file, ": tensor ", in_quotes(key),
                   " stands twice in the header; names must be unique");
      fields.clear();
    } else if (depth == 2) {
      NATSLM_CHECK(fields.insert(key).second, file, ": field ", in_quotes(key),
                   " stands twice in one header entry; it must stand once");
    }
    return true;
  };
  json parsed;
  try {
    parsed = json::parse(header, watch);
  } catch (const json::exception&) {
    fail(file, ": the header is not valid JSON (", header.size(),
         " bytes at offset 8); the file is damaged, get it again");
  }
  NATSLM_CHECK(parsed.is_object(), file, ": the header is ", brief(parsed),
               ", expected a JSON object of tensors");
  return parsed;
}

// One header entry, its offset still relative to the start of the data.
SafetensorsFile::Entry parse_entry(const std::string& file, const std::string& name,
                                   const json& value) {
  const std::string where = file + ": tensor " + in_quotes(name);
  NATSLM_CHECK(value.is_object() && value.size() == 3 && value.contains("dtype") &&
                   value.contains("shape") && value.contains("data_offsets"),
               where, " is described as ", brief(value),
               ", expected an object with dtype, shape and data_offsets");
  SafetensorsFile::Entry entry;
  entry.name = name;

  const json& dtype = value["dtype"];
  const auto type = std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeName& t) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == t.name;
  });
  NATSLM_CHECK(type != kTypes.end(), where, " has dtype ", brief(dtype), ", expected one of ",
               type_list());
  entry.dtype = type->type;

  const json& shape = value["shape"];
  NATSLM_CHECK(shape.is_array() && shape.size() <= kMaxDims, where, " has shape ", brief(shape),
               ", expected an array of at most ", kMaxDims, " sizes");
  uint64_t elements = 1, strides = 1;  // strides: a size of 0 must not hide absurd other ones
  for (const json& size : shape) {
    NATSLM_CHECK(size.is_number_unsigned() && size.get<uint64_t>() <= kMaxElements, where,
                 " has shape ", brief(shape), ", expected whole numbers from 0 to ", kMaxElements);
    const auto n = size.get<uint64_t>();
    entry.shape.push_back(static_cast<int64_t>(n));
    NATSLM_CHECK(n == 0 || strides <= kMaxElements / n, where, " has shape ", brief(shape),
                 ", expected at most ", kMaxElements, " elements");
    elements *= n;
    strides *= std::max<uint64_t>(n, 1);
  }

  const json& range = value["data_offsets"];
  NATSLM_CHECK(
      range.is_array() && range.size() == 2 && range[0].is_number_unsigned() &&
          range[1].is_number_unsigned() && range[0].get<uint64_t>() <= range[1].get<uint64_t>(),
      where, " has data_offsets ", brief(range), ", expected [begin, end] with begin <= end");
  entry.offset = range[0].get<uint64_t>();
  entry.bytes = range[1].get<uint64_t>() - entry.offset;
  const uint64_t expected = elements * c10::elementSize(entry.dtype);
  NATSLM_CHECK(entry.bytes == expected, where, " has ", entry.bytes, " bytes, expected ", expected,
               " for dtype ", type->name, " and shape ", shape_text(entry.shape));
  return entry;
}

Metadata parse_metadata(const std::string& file, const json& value) {
  NATSLM_CHECK(value.is_object(), file, ": __metadata__ is ", brief(value),
               ", expected an object of strings");
  Metadata metadata;
  for (const auto& [key, text] : value.items()) {
    NATSLM_CHECK(text.is_string(), file, ": __metadata__ entry ", in_quotes(key), " is ",
                 brief(text), ", expected a string");
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

}  // namespace

// A private mapping of a whole file: writing to a tensor changes memory, never the file.
class SafetensorsFile::Mapping {
 public:
  explicit Mapping(const std::filesystem::path& path) {
    const std::string file = path.string();
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    NATSLM_CHECK(fd >= 0, file, ": cannot open: ", std::strerror(errno));
    struct stat status = {};
    if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(fd);
      fail(file, ": is not a regular file; expected a .safetensors file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
    if (size_ < kLengthBytes) {
      ::close(fd);
      fail(file, ": has ", size_, " bytes, expected at least ", kLengthBytes,
           "; the file is truncated, get it again");
    }
    void* address = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    NATSLM_CHECK(address != MAP_FAILED, file, ": cannot map ", size_,
                 " bytes: ", std::strerror(error));
    data_ = static_cast<char*>(address);
  }
  ~Mapping() { ::munmap(data_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  char* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  uint64_t size_ = 0;
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : path_(path), mapping_(std::make_shared<Mapping>(path)) {
  const std::string file = path.string();
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping_->data(), kLengthBytes);
  const uint64_t available = mapping_->size() - kLengthBytes;
  NATSLM_CHECK(header_bytes <= available && header_bytes <= kMaxHeader, file,
               ": the header claims ", header_bytes, " bytes, expected at most ",
               std::min(available, kMaxHeader),
               "; the file is truncated or not a safetensors file");
  const json header = parse_header(file, {mapping_->data() + kLengthBytes, header_bytes});

  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      metadata_ = parse_metadata(file, value);
    } else {
      entries_.push_back(parse_entry(file, name, value));
    }
  }
  std::stable_sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
  });
  uint64_t end = 0;
  for (Entry& entry : entries_) {
    NATSLM_CHECK(entry.offset == end, file, ": tensor ", in_quotes(entry.name),
                 " starts at data byte ", entry.offset, ", expected ", end,
                 " (ranges must neither overlap nor leave gaps)");
    end += entry.bytes;
    entry.offset += kLengthBytes + header_bytes;
  }
  const uint64_t found = available - header_bytes;
  NATSLM_CHECK(end == found, file, ": has ", found, " bytes of data, the header expects ", end,
               found < end ? "; the file is truncated, get it again" : "; the file is damaged");
  for (size_t i = 0; i < entries_.size(); ++i) index_[entries_[i].name] = i;
}

const SafetensorsFile::Entry& SafetensorsFile::entry(const std::string& name) const {
  const auto found = index_.find(name);
  NATSLM_CHECK(found != index_.end(), path_.string(), ": has no tensor ", in_quotes(name),
               "; it has ", entries_.size(), " tensors",
               entries_.empty() ? "" : ", the first is " + in_quotes(entries_.front().name));
  return entries_[found->second];
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& e = entry(name);
  char* data = mapping_->data() + e.offset;
  if (e.bytes > 0 && reinterpret_cast<uintptr_t>(data) % c10::elementSize(e.dtype) == 0) {
    return at::from_blob(
        data, e.shape, [keep = mapping_](void*) {}, at::TensorOptions().dtype(e.dtype));
  }
  at::Tensor copy = at::empty(e.shape, at::TensorOptions().dtype(e.dtype));
  if (e.bytes > 0) std::memcpy(copy.mutable_data_ptr(), data, e.bytes);
  return copy;
}

at::Tensor SafetensorsFile::tensor(const std::string& name, at::IntArrayRef shape) const {
  const Entry& e = entry(name);
  NATSLM_CHECK(at::IntArrayRef(e.shape) == shape, path_.string(), ": tensor ", in_quotes(name),
               " has shape ", shape_text(e.shape), ", expected ", shape_text(shape));
  NATSLM_CHECK(at::isFloatingType(e.dtype), path_.string(), ": tensor ", in_quotes(name),
               " has dtype ", c10::toString(e.dtype), ", expected a floating-point one");
  return tensor(name);
}

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const Metadata& metadata) {
  const std::string file = path.string();
  // Wide types first: each tensor then starts at a multiple of its element size.
  std::vector<const NamedTensors::value_type*> order;
  for (const auto& item : tensors) order.push_back(&item);
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return a->second.element_size() > b->second.element_size();
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::set<std::string> names = {"__metadata__"};
  uint64_t end = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    NATSLM_CHECK(names.insert(name).second, file, ": cannot write tensor ", in_quotes(name),
                 ": the name is reserved or used twice");
    const auto type = std::find_if(
        kTypes.begin(), kTypes.end(),
        [&, t = tensor.scalar_type()](const TypeName& known) { return known.type == t; });
    NATSLM_CHECK(type != kTypes.end(), file, ": cannot write tensor ", in_quotes(name), " of type ",
                 c10::toString(tensor.scalar_type()), "; the format knows ", type_list());
    const uint64_t begin = end;
    end += tensor.nbytes();
    header[name] = {
        {"dtype", type->name}, {"shape", tensor.sizes().vec()}, {"data_offsets", {begin, end}}};
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception&) {
    fail(file, ": cannot write a name or metadata that is not valid UTF-8");
  }
  while ((kLengthBytes + text.size()) % kAlignment != 0) text += ' ';

  AtomicFile out(path);
  const uint64_t header_bytes = text.size();
  out.write(&header_bytes, kLengthBytes);
  out.write(text);
  for (const auto* item : order) {
    const at::Tensor data = item->second.detach().cpu().contiguous();
    out.write(data.const_data_ptr(), data.nbytes());
  }
  out.commit();
}

}  // namespace natslm::models
