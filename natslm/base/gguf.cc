// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm {
namespace {

using Value = GgufFile::Value;
using ValueType = GgufFile::ValueType;

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr std::string_view kMagic = "GGUF";
constexpr uint32_t kDefaultAlignment = 32;
constexpr uint32_t kMaxAlignment = 1u << 20;
constexpr uint64_t kMaxNameBytes = 65535;  // the format's limit for keys
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // products of sizes stay far from overflow
constexpr int kMaxNesting = 8;                        // arrays in arrays

struct ValueTypeFacts {
  std::string_view name;
  uint64_t bytes;  // 0: of a varying length
};
constexpr std::array<ValueTypeFacts, 13> kValueTypes = {{{"U8", 1},
                                                         {"I8", 1},
                                                         {"U16", 2},
                                                         {"I16", 2},
                                                         {"U32", 4},
                                                         {"I32", 4},
                                                         {"F32", 4},
                                                         {"bool", 1},
                                                         {"string", 0},
                                                         {"array", 0},
                                                         {"U64", 8},
                                                         {"I64", 8},
                                                         {"F64", 8}}};

const ValueTypeFacts& facts_of(ValueType type) {
  return kValueTypes[static_cast<size_t>(type)];
}

// Smallest number of bytes that one value of the type takes.
uint64_t least_bytes(ValueType type) {
  if (type == ValueType::kString) return 8;  // its length
  if (type == ValueType::kArray) return 12;  // element type and count
  return facts_of(type).bytes;
}

std::string text_of(ValueType type, ValueType element) {
  if (type != ValueType::kArray) return std::string(facts_of(type).name);
  return "array of " + std::string(facts_of(element).name);
}

template <class T>
T number_at(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// Reads from front to back; whatever would go past the end is an Error that names the place.
class Cursor {
 public:
  Cursor(const std::string& file, std::span<const std::byte> bytes) : file_(file), bytes_(bytes) {}

  uint64_t position() const { return at_; }
  uint64_t left() const { return bytes_.size() - at_; }
  const std::string& file() const { return file_; }

  std::span<const std::byte> take(uint64_t count, std::string_view what) {
    NATSLM_CHECK(count <= left(), file_, ": ", what, " at byte ", at_, " needs ", count,
                 " bytes, but the file ends after ", left(), " more; it is truncated or damaged");
    const auto taken = bytes_.subspan(at_, count);
    at_ += count;
    return taken;
  }
  template <class T>
  T number(std::string_view what) {
    return number_at<T>(take(sizeof(T), what).data());
  }
  std::string_view string(std::string_view what) {
    const auto length = number<uint64_t>(what);
    const auto text = take(length, what);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }
  // A count of things of which each takes at least so many bytes.
  uint64_t count(uint64_t least, std::string_view what) {
    const auto n = number<uint64_t>(what);
    NATSLM_CHECK(n <= left() / least, file_, ": ", what, " claims ", n,
                 " entries, but the file has room for ", left() / least,
                 " at most; it is truncated or damaged");
    return n;
  }

 private:
  const std::string& file_;
  std::span<const std::byte> bytes_;
  uint64_t at_ = 0;
};

ValueType read_type(Cursor& cursor, std::string_view what) {
  const auto type = cursor.number<uint32_t>(what);
  NATSLM_CHECK(type < kValueTypes.size(), cursor.file(), ": ", what, " has value type ", type,
               ", expected 0 to ", kValueTypes.size() - 1);
  return static_cast<ValueType>(type);
}

// Walks over a value and everything in it; `all` is what the cursor runs over.
Value read_value(Cursor& cursor, std::span<const std::byte> all, ValueType type, int nesting,
                 std::string_view what) {
  Value value;
  value.type = type;
  uint64_t begin = cursor.position();
  const auto check_bools = [&](std::span<const std::byte> bytes) {
    for (const std::byte b : bytes)
      NATSLM_CHECK(std::to_integer<int>(b) <= 1, cursor.file(), ": ", what, " holds a bool of ",
                   std::to_integer<int>(b), ", expected 0 or 1");
  };
  if (type == ValueType::kString) {
    cursor.string(what);
  } else if (type == ValueType::kArray) {
    NATSLM_CHECK(nesting < kMaxNesting, cursor.file(), ": ", what, " nests more than ", kMaxNesting,
                 " arrays");
    value.element = read_type(cursor, what);
    value.count = cursor.count(least_bytes(value.element), what);
    begin = cursor.position();
    if (const uint64_t bytes = facts_of(value.element).bytes) {
      const auto taken = cursor.take(value.count * bytes, what);
      if (value.element == ValueType::kBool) check_bools(taken);
    } else {
      for (uint64_t i = 0; i < value.count; ++i)
        read_value(cursor, all, value.element, nesting + 1, what);
    }
  } else {
    const auto taken = cursor.take(facts_of(type).bytes, what);
    if (type == ValueType::kBool) check_bools(taken);
  }
  value.bytes = all.subspan(begin, cursor.position() - begin);
  return value;
}

const WeightTypeFacts* type_numbered(uint32_t number) {
  const auto found =
      std::find_if(kWeightTypes.begin(), kWeightTypes.end(), [&](const WeightTypeFacts& t) {
        return t.gguf >= 0 && static_cast<uint32_t>(t.gguf) == number;
      });
  return found == kWeightTypes.end() ? nullptr : &*found;
}

std::string known_types() {
  std::vector<std::string_view> names;
  for (const WeightTypeFacts& t : kWeightTypes)
    if (t.gguf >= 0) names.push_back(t.name);
  return list(names);
}

// A tensor, its bytes still to be found: `offset` counts from the start of the data.
struct Described {
  GgufFile::Tensor tensor;
  uint64_t offset = 0, bytes = 0;
};

Described read_tensor(Cursor& cursor) {
  Described d;
  GgufFile::Tensor& tensor = d.tensor;
  tensor.name = cursor.string("a tensor's name");
  const std::string what = "tensor " + in_quotes(tensor.name);
  const std::string where = cursor.file() + ": " + what;
  NATSLM_CHECK(!tensor.name.empty() && tensor.name.size() <= kMaxNameBytes, where,
               " has a name of ", tensor.name.size(), " bytes, expected 1 to ", kMaxNameBytes);
  const auto dims = cursor.number<uint32_t>(what);
  NATSLM_CHECK(dims <= kMaxDims, where, " has ", dims, " dimensions, expected at most ", kMaxDims);
  uint64_t elements = 1, strides = 1;  // strides: a size of 0 must not hide absurd other ones
  for (uint32_t i = 0; i < dims; ++i) {
    const auto n = cursor.number<uint64_t>(what);
    NATSLM_CHECK(n <= kMaxElements && (n == 0 || strides <= kMaxElements / n), where,
                 " has a size of ", n, " in dimension ", i, ", expected at most ", kMaxElements,
                 " elements in all");
    elements *= n;
    strides *= std::max<uint64_t>(n, 1);
    tensor.shape.push_back(static_cast<int64_t>(n));
  }
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  const auto number = cursor.number<uint32_t>(what);
  const WeightTypeFacts* type = type_numbered(number);
  NATSLM_CHECK(type, where, " has type number ", number, ", which is not read here; known are ",
               known_types());
  tensor.type = type->type;
  const uint64_t row = tensor.shape.empty() ? 1 : static_cast<uint64_t>(tensor.shape.back());
  NATSLM_CHECK(row % type->block == 0, where, " of type ", type->name, " has rows of ", row,
               " elements, expected a multiple of ", type->block);
  d.bytes = elements / type->block * type->bytes;
  d.offset = cursor.number<uint64_t>(what);
  return d;
}

// An integer of any type; false if the value is none.
bool integer_of(ValueType type, const std::byte* at, int64_t& value, bool& above) {
  above = false;
  switch (type) {
    case ValueType::kU8:
      value = number_at<uint8_t>(at);
      return true;
    case ValueType::kI8:
      value = number_at<int8_t>(at);
      return true;
    case ValueType::kU16:
      value = number_at<uint16_t>(at);
      return true;
    case ValueType::kI16:
      value = number_at<int16_t>(at);
      return true;
    case ValueType::kU32:
      value = number_at<uint32_t>(at);
      return true;
    case ValueType::kI32:
      value = number_at<int32_t>(at);
      return true;
    case ValueType::kU64:
      value = number_at<int64_t>(at);
      above = value < 0;
      return true;
    case ValueType::kI64:
      value = number_at<int64_t>(at);
      return true;
    default:
      return false;
  }
}

bool real_of(ValueType type, const std::byte* at, float& value) {
  if (type == ValueType::kF32) {
    value = number_at<float>(at);
  } else if (type == ValueType::kF64) {
    value = static_cast<float>(number_at<double>(at));
  } else {
    return false;
  }
  return true;
}

}  // namespace

// Finds, decodes and complains in the name of one metadata value.
class GgufFile::Reader {
 public:
  Reader(const GgufFile& file, std::string_view key, std::string_view expected)
      : file_(file), key_(key), expected_(expected) {
    value_ = file.find(key);
    NATSLM_CHECK(value_, file.path().string(), ": has no metadata ", in_quotes(key), ", expected ",
                 expected);
  }

  const Value& scalar(ValueType type) const {
    if (value_->type != type) complain();
    return *value_;
  }
  const Value& array(ValueType element) const {
    if (!value_->is_array() || value_->element != element) complain();
    return *value_;
  }

  template <class T>
  T integer() const {
    if (value_->is_array()) complain();
    return integer<T>(value_->type, value_->bytes.data());
  }
  float real() const {
    float value = 0;
    if (value_->is_array() || !real_of(value_->type, value_->bytes.data(), value)) complain();
    return value;
  }
  template <class T>
  std::vector<T> integers() const {
    if (!value_->is_array()) complain();
    const uint64_t bytes = facts_of(value_->element).bytes;
    if (bytes == 0) complain();
    std::vector<T> values(value_->count);
    for (uint64_t i = 0; i < values.size(); ++i)
      values[i] = integer<T>(value_->element, value_->bytes.data() + i * bytes);
    return values;
  }
  std::vector<float> reals() const {
    if (!value_->is_array()) complain();
    const uint64_t bytes = facts_of(value_->element).bytes;
    std::vector<float> values(bytes == 0 ? 0 : value_->count);
    if (bytes == 0) complain();
    for (uint64_t i = 0; i < values.size(); ++i)
      if (!real_of(value_->element, value_->bytes.data() + i * bytes, values[i])) complain();
    return values;
  }

 private:
  template <class T>
  T integer(ValueType type, const std::byte* at) const {
    int64_t value = 0;
    bool above = false;  // above what an int64 holds
    if (!integer_of(type, at, value, above)) complain();
    const bool fits = !above && value >= static_cast<int64_t>(std::numeric_limits<T>::min()) &&
                      value <= static_cast<int64_t>(std::numeric_limits<T>::max());
    if (!fits)
      fail(file_.path().string(), ": metadata ", in_quotes(key_), " holds ",
           above ? std::to_string(static_cast<uint64_t>(value)) : std::to_string(value),
           ", expected ", expected_, " from ", std::numeric_limits<T>::min(), " to ",
           std::numeric_limits<T>::max());
    return static_cast<T>(value);
  }
  [[noreturn]] void complain() const {
    fail(file_.path().string(), ": metadata ", in_quotes(key_), " is of type ",
         text_of(value_->type, value_->element), ", expected ", expected_);
  }

  const GgufFile& file_;
  std::string_view key_, expected_;
  const Value* value_ = nullptr;
};

GgufFile GgufFile::open(const std::filesystem::path& path) {
  GgufFile result;
  result.file_ = std::make_shared<const MappedFile>(path);
  const std::string file = path.string();
  const auto all = result.file_->bytes();
  Cursor cursor(file, all);

  const auto magic = cursor.take(kMagic.size(), "the mark 'GGUF'");
  NATSLM_CHECK(std::memcmp(magic.data(), kMagic.data(), kMagic.size()) == 0, file,
               ": does not start with 'GGUF'; it is not a GGUF file");
  result.version_ = cursor.number<uint32_t>("the version");
  NATSLM_CHECK(result.version_ == 0 || (result.version_ & 0xffffu) != 0, file,
               ": is a big-endian GGUF file; only little-endian ones are read here");
  NATSLM_CHECK(result.version_ == 2 || result.version_ == 3, file, ": is GGUF version ",
               result.version_, ", expected 2 or 3");
  constexpr uint64_t kLeastTensorBytes = 8 + 4 + 4 + 8, kLeastEntryBytes = 8 + 4 + 1;
  const uint64_t tensors = cursor.count(kLeastTensorBytes, "the tensor table");
  const uint64_t entries = cursor.count(kLeastEntryBytes, "the metadata");

  for (uint64_t i = 0; i < entries; ++i) {
    const std::string_view key = cursor.string("a metadata key");
    const std::string what = "metadata " + in_quotes(key);
    NATSLM_CHECK(!key.empty() && key.size() <= kMaxNameBytes, file, ": ", what, " has a key of ",
                 key.size(), " bytes, expected 1 to ", kMaxNameBytes);
    const ValueType type = read_type(cursor, what);
    const Value value = read_value(cursor, all, type, 0, what);
    NATSLM_CHECK(result.metadata_.emplace(key, value).second, file, ": ", what,
                 " stands twice; keys must be unique");
  }

  const uint32_t alignment = result.get_u32("general.alignment", kDefaultAlignment);
  NATSLM_CHECK(std::has_single_bit(alignment) && alignment <= kMaxAlignment, file,
               ": metadata 'general.alignment' is ", alignment,
               ", expected a power of two of at most ", kMaxAlignment);

  std::vector<Described> described;
  described.reserve(tensors);
  for (uint64_t i = 0; i < tensors; ++i) described.push_back(read_tensor(cursor));
  std::stable_sort(described.begin(), described.end(), [](const Described& a, const Described& b) {
    return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes;
  });

  const uint64_t header = cursor.position();
  const uint64_t padding = (alignment - header % alignment) % alignment;
  const auto data = all.subspan(std::min<uint64_t>(header + padding, all.size()));
  uint64_t end = 0;
  std::string_view before;
  for (Described& d : described) {
    const std::string where = file + ": tensor " + in_quotes(d.tensor.name);
    NATSLM_CHECK(d.offset % alignment == 0, where, " starts at data byte ", d.offset,
                 ", expected a multiple of the alignment ", alignment);
    NATSLM_CHECK(d.offset <= data.size() && d.bytes <= data.size() - d.offset, where, " has ",
                 d.bytes, " bytes from data byte ", d.offset, " on, but the file holds ",
                 data.size(), " bytes of data; it is truncated or damaged");
    NATSLM_CHECK(d.bytes == 0 || d.offset >= end, where, " starts at data byte ", d.offset,
                 ", but tensor ", in_quotes(before), " ends at ", end,
                 "; tensors must not overlap");
    d.tensor.bytes = data.subspan(d.offset, d.bytes);
    if (d.bytes > 0) {
      end = d.offset + d.bytes;
      before = d.tensor.name;
    }
    NATSLM_CHECK(result.tensor_index_.emplace(d.tensor.name, result.tensors_.size()).second, where,
                 " stands twice in the table; names must be unique");
    result.tensors_.push_back(std::move(d.tensor));
  }
  return result;
}

const Value* GgufFile::find(std::string_view key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

bool GgufFile::get_bool(std::string_view key) const {
  return number_at<uint8_t>(Reader(*this, key, "a bool").scalar(ValueType::kBool).bytes.data());
}

uint32_t GgufFile::get_u32(std::string_view key) const {
  return Reader(*this, key, "a whole number").integer<uint32_t>();
}

int64_t GgufFile::get_i64(std::string_view key) const {
  return Reader(*this, key, "a whole number").integer<int64_t>();
}

float GgufFile::get_f32(std::string_view key) const {
  return Reader(*this, key, "a real number (F32 or F64)").real();
}

std::string_view GgufFile::get_string(std::string_view key) const {
  const Value& value = Reader(*this, key, "a string").scalar(ValueType::kString);
  return {reinterpret_cast<const char*>(value.bytes.data()) + 8, value.bytes.size() - 8};
}

std::vector<std::string_view> GgufFile::get_strings(std::string_view key) const {
  const Value& value = Reader(*this, key, "an array of strings").array(ValueType::kString);
  const std::string file = path().string();
  Cursor cursor(file, value.bytes);
  std::vector<std::string_view> strings(value.count);
  for (std::string_view& s : strings) s = cursor.string(key);
  return strings;
}

std::vector<int32_t> GgufFile::get_i32s(std::string_view key) const {
  return Reader(*this, key, "an array of whole numbers").integers<int32_t>();
}

std::vector<float> GgufFile::get_f32s(std::string_view key) const {
  return Reader(*this, key, "an array of real numbers (F32 or F64)").reals();
}

std::vector<bool> GgufFile::get_bools(std::string_view key) const {
  const Value& value = Reader(*this, key, "an array of bools").array(ValueType::kBool);
  std::vector<bool> bools(value.count);
  for (uint64_t i = 0; i < value.count; ++i) bools[i] = std::to_integer<int>(value.bytes[i]) != 0;
  return bools;
}

std::vector<Value> GgufFile::get_arrays(std::string_view key) const {
  const Value& value = Reader(*this, key, "an array of arrays").array(ValueType::kArray);
  const std::string file = path().string();
  Cursor cursor(file, value.bytes);
  std::vector<Value> arrays(value.count);
  for (Value& a : arrays) a = read_value(cursor, value.bytes, ValueType::kArray, 1, key);
  return arrays;
}

bool GgufFile::get_bool(std::string_view key, bool missing) const {
  return contains(key) ? get_bool(key) : missing;
}

uint32_t GgufFile::get_u32(std::string_view key, uint32_t missing) const {
  return contains(key) ? get_u32(key) : missing;
}

int64_t GgufFile::get_i64(std::string_view key, int64_t missing) const {
  return contains(key) ? get_i64(key) : missing;
}

float GgufFile::get_f32(std::string_view key, float missing) const {
  return contains(key) ? get_f32(key) : missing;
}

std::string_view GgufFile::get_string(std::string_view key, std::string_view missing) const {
  return contains(key) ? get_string(key) : missing;
}

const GgufFile::Tensor* GgufFile::find_tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

const GgufFile::Tensor& GgufFile::tensor(std::string_view name) const {
  const Tensor* found = find_tensor(name);
  NATSLM_CHECK(found, path().string(), ": has no tensor ", in_quotes(name), "; it has ",
               tensors_.size(), " tensors",
               tensors_.empty() ? "" : ", the first is " + in_quotes(tensors_.front().name));
  return *found;
}

}  // namespace natslm
