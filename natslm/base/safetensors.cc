// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm {
namespace {

using nlohmann::json;
using Entry = MappedSafetensors::Entry;

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr size_t kMaxDims = 16;
constexpr int kMaxNesting = 3;                        // the header, a tensor in it, its shape
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // products of sizes stay far from overflow
constexpr uint64_t kAlignment = 64;  // of the data, so that mapped tensors are aligned

std::string type_list() {
  std::vector<std::string_view> names;
  for (const WeightTypeFacts& t : kWeightTypes)
    if (t.safetensors) names.push_back(t.name);
  return list(names);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return "[" + list(shape) + "]";
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
  // Elements so far of what is open at each depth, an array if they are many: a hostile header must
  // not grow a hundredfold in memory, nor nest so deep that destroying it ends the program.
  std::array<size_t, kMaxNesting + 1> elements{};
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    const bool opens = event == Event::object_start || event == Event::array_start;
    if (opens) {
      NATSLM_CHECK(depth < kMaxNesting, file, ": the header nests more than ", kMaxNesting,
                   " levels deep; it is not a safetensors header");
      elements[depth + 1] = 0;
    }
    if (opens || event == Event::value) {
      NATSLM_CHECK(++elements[depth] <= kMaxDims, file,
                   ": the header has a longer array, expected an array of at most ", kMaxDims,
                   " sizes");
    }
    if (event == Event::key) elements[depth] = 0;
    if (event != Event::key) return true;
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

// One header entry, its bytes still to be found: `offset` counts from the start of the data.
struct Described {
  Entry entry;
  uint64_t offset = 0, bytes = 0;
};

Described parse_entry(const std::string& file, const std::string& name, const json& value) {
  const std::string where = file + ": tensor " + in_quotes(name);
  NATSLM_CHECK(value.is_object() && value.size() == 3 && value.contains("dtype") &&
                   value.contains("shape") && value.contains("data_offsets"),
               where, " is described as ", brief(value),
               ", expected an object with dtype, shape and data_offsets");
  Described described;
  Entry& entry = described.entry;
  entry.name = name;

  const json& dtype = value["dtype"];
  const auto type =
      std::find_if(kWeightTypes.begin(), kWeightTypes.end(), [&](const WeightTypeFacts& t) {
        return t.safetensors && dtype.is_string() && dtype.get_ref<const std::string&>() == t.name;
      });
  NATSLM_CHECK(type != kWeightTypes.end(), where, " has dtype ", brief(dtype), ", expected one of ",
               type_list());
  entry.type = type->type;

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
  described.offset = range[0].get<uint64_t>();
  described.bytes = range[1].get<uint64_t>() - described.offset;
  const uint64_t expected = elements * type->bytes;
  NATSLM_CHECK(described.bytes == expected, where, " has ", described.bytes, " bytes, expected ",
               expected, " for dtype ", type->name, " and shape ", shape_text(entry.shape));
  return described;
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

MappedSafetensors::MappedSafetensors(const std::filesystem::path& path)
    : file_(std::make_shared<const MappedFile>(path)) {
  const std::string file = path.string();
  NATSLM_CHECK(file_->size() >= kLengthBytes, file, ": has ", file_->size(),
               " bytes, expected at least ", kLengthBytes, "; the file is truncated, get it again");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file_->data(), kLengthBytes);
  const uint64_t available = file_->size() - kLengthBytes;
  NATSLM_CHECK(header_bytes <= available && header_bytes <= kMaxHeader, file,
               ": the header claims ", header_bytes, " bytes, expected at most ",
               std::min(available, kMaxHeader),
               "; the file is truncated or not a safetensors file");
  const auto* text = reinterpret_cast<const char*>(file_->data()) + kLengthBytes;
  const json header = parse_header(file, {text, header_bytes});

  std::vector<Described> described;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      metadata_ = parse_metadata(file, value);
    } else {
      described.push_back(parse_entry(file, name, value));
    }
  }
  std::stable_sort(described.begin(), described.end(), [](const Described& a, const Described& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
  });
  const auto data = file_->bytes().subspan(kLengthBytes + header_bytes);
  uint64_t end = 0;
  for (const Described& d : described) {
    NATSLM_CHECK(d.offset == end, file, ": tensor ", in_quotes(d.entry.name),
                 " starts at data byte ", d.offset, ", expected ", end,
                 " (ranges must neither overlap nor leave gaps)");
    end += d.bytes;
  }
  NATSLM_CHECK(
      end == data.size(), file, ": has ", data.size(), " bytes of data, the header expects ", end,
      data.size() < end ? "; the file is truncated, get it again" : "; the file is damaged");
  for (Described& d : described) {
    d.entry.bytes = data.subspan(d.offset, d.bytes);
    index_[d.entry.name] = entries_.size();
    entries_.push_back(std::move(d.entry));
  }
}

const Entry* MappedSafetensors::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &entries_[found->second];
}

const Entry& MappedSafetensors::entry(std::string_view name) const {
  const Entry* found = find(name);
  NATSLM_CHECK(found, path().string(), ": has no tensor ", in_quotes(name), "; it has ",
               entries_.size(), " tensors",
               entries_.empty() ? "" : ", the first is " + in_quotes(entries_.front().name));
  return *found;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     std::span<const Tensor> tensors, const Metadata& metadata)
    : file_(path) {
  const std::string file = path.string();
  for (size_t i = 0; i < tensors.size(); ++i) order_.push_back(i);
  std::stable_sort(order_.begin(), order_.end(), [&](size_t a, size_t b) {
    return facts(tensors[a].type).bytes > facts(tensors[b].type).bytes;
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::set<std::string_view> names = {"__metadata__"};
  uint64_t end = 0;
  for (const size_t i : order_) {
    const auto& [name, type, shape] = tensors[i];
    NATSLM_CHECK(names.insert(name).second, file, ": cannot write tensor ", in_quotes(name),
                 ": the name is reserved or used twice");
    NATSLM_CHECK(facts(type).safetensors, file, ": cannot write tensor ", in_quotes(name),
                 " of type ", facts(type).name, "; the format knows ", type_list());
    const uint64_t begin = end;
    uint64_t bytes = facts(type).bytes;
    for (const int64_t size : shape) bytes *= static_cast<uint64_t>(size);
    end += bytes;
    header[name] = {{"dtype", facts(type).name}, {"shape", shape}, {"data_offsets", {begin, end}}};
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception&) {
    fail(file, ": cannot write a name or metadata that is not valid UTF-8");
  }
  while ((kLengthBytes + text.size()) % kAlignment != 0) text += ' ';

  const uint64_t header_bytes = text.size();
  file_.write(&header_bytes, kLengthBytes);
  file_.write(text);
  end_ = file_.written() + end;
}

void SafetensorsWriter::commit() {
  NATSLM_ASSERT(file_.written() == end_);
  file_.commit();
}

std::vector<std::vector<size_t>> plan_shards(std::span<const uint64_t> bytes, uint64_t limit) {
  std::vector<std::vector<size_t>> shards(1);
  uint64_t filled = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (!shards.back().empty() && (filled >= limit || bytes[i] > limit - filled)) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(i);
    filled += bytes[i];
  }
  return shards;
}

std::string shard_name(size_t shard, size_t shards) {
  if (shards == 1) return "model.safetensors";
  const auto padded = [](size_t number) {
    const std::string digits = std::to_string(number);
    return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
  };
  return "model-" + padded(shard + 1) + "-of-" + padded(shards) + ".safetensors";
}

}  // namespace natslm
