// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>

#include "natslm/base/error.h"
#include "tests/support/memory_file.h"
#include "tests/support/safetensors_bytes.h"
#include "tests/support/scratch_folder.h"

namespace natslm {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Tensor = SafetensorsWriter::Tensor;

class MappedSafetensorsTest : public ::testing::Test {
 protected:
  void put(std::string_view bytes) const {
    std::ofstream(path_, std::ios::binary).write(bytes.data(), std::ssize(bytes));
  }
  void put_header(std::string_view header, size_t data_bytes) const {
    put(test::safetensors_bytes(header, data_bytes));
  }
  // Byte i of each tensor is i.
  void write(const std::vector<Tensor>& tensors, const Metadata& metadata = {}) const {
    SafetensorsWriter out(path_, tensors, metadata);
    for (const size_t i : out.order()) {
      size_t bytes = facts(tensors[i].type).bytes;
      for (const int64_t size : tensors[i].shape) bytes *= size;
      std::vector<std::byte> data(bytes);
      for (size_t b = 0; b < bytes; ++b) data[b] = static_cast<std::byte>(b);
      out.write(data);
    }
    out.commit();
  }
  void write_small_set() const {
    write({{"a", WeightType::kF32, {2, 3}},
           {"b.weight", WeightType::kBF16, {3}},
           {"c", WeightType::kF32, {}},
           {"none", WeightType::kF32, {0, 4}}},
          {{"k", "v"}});
  }
  // The message of opening the file, "" if that worked; touches every byte of every tensor, so that
  // a wrong range would be seen by the sanitizer or the memory manager.
  std::string open_error() const { return open_error(path_); }
  static std::string open_error(const fs::path& path) {
    try {
      const MappedSafetensors file(path);
      volatile std::byte last{};
      for (const auto& entry : file.entries())
        for (const std::byte b : entry.bytes) last = b;
      static_cast<void>(last);
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  }

  test::ScratchFolder scratch_;
  const fs::path folder_ = scratch_.path(), path_ = folder_ / "weights.safetensors";
};

TEST_F(MappedSafetensorsTest, EveryTypeOfTheFormatIsReadBack) {
  std::vector<Tensor> tensors;
  for (const WeightTypeFacts& type : kWeightTypes)
    if (type.safetensors) tensors.push_back({"of " + std::string(type.name), type.type, {3, 5}});
  write(tensors, {{"format", "pt"}, {"note", "line\nbreak \xc3\xa9"}});
  const MappedSafetensors file(path_);
  EXPECT_EQ(file.metadata().at("note"), "line\nbreak \xc3\xa9");
  ASSERT_EQ(file.entries().size(), tensors.size());
  for (const Tensor& t : tensors) {
    const auto& entry = file.entry(t.name);
    EXPECT_EQ(entry.type, t.type) << t.name;
    EXPECT_THAT(entry.shape, ElementsAre(3, 5)) << t.name;
    ASSERT_EQ(entry.bytes.size(), 15 * facts(t.type).bytes) << t.name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(entry.bytes.data()) % facts(t.type).bytes, 0) << t.name;
    for (size_t b = 0; b < entry.bytes.size(); ++b)
      EXPECT_EQ(std::to_integer<size_t>(entry.bytes[b]), b) << t.name;
  }
}

TEST_F(MappedSafetensorsTest, QuantisedTypesCannotBeWritten) {
  EXPECT_THROW(write({{"q", WeightType::kQ4_0, {32}}}), Error);
}

TEST_F(MappedSafetensorsTest, AMissingNameIsAnErrorThatSaysWhatIsThere) {
  write_small_set();
  const MappedSafetensors file(path_);
  EXPECT_EQ(file.find("nope"), nullptr);
  try {
    file.entry("nope");
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("no tensor 'nope'"), HasSubstr("it has 4 tensors")));
  }
}

TEST_F(MappedSafetensorsTest, TheOrderOfTheHeaderDoesNotMatter) {
  put_header(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
             R"("a":{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}}   )",
             8);
  const MappedSafetensors file(path_);
  ASSERT_EQ(file.entries().size(), 2);
  EXPECT_EQ(file.entries()[0].name, "a");
}

TEST_F(MappedSafetensorsTest, AFileTruncatedAnywhereIsRefusedInOneLine) {
  write_small_set();
  const std::string whole = read_file(path_);
  const MemoryFile cut;
  for (size_t size = 0; size < whole.size(); ++size) {
    cut.set(std::string_view(whole).substr(0, size));
    const std::string error = open_error(cut.path());
    ASSERT_THAT(error, HasSubstr(cut.path().string())) << "cut to " << size << " bytes";
    ASSERT_THAT(error, Not(HasSubstr("\n"))) << "cut to " << size << " bytes";
  }
}

TEST_F(MappedSafetensorsTest, AFlippedHeaderBitIsRefusedOrHarmless) {
  write_small_set();
  const std::string whole = read_file(path_);
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  const MemoryFile damaged;
  int refused = 0;
  for (size_t bit = 0; bit < 8 * (8 + header); ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    damaged.set(flipped);
    const std::string error = open_error(damaged.path());  // also reads every byte of every tensor
    ASSERT_THAT(error, Not(HasSubstr("\n"))) << "bit " << bit << ": " << error;
    refused += !error.empty();
  }
  // A flip inside a name, the metadata or the padding can go unnoticed; the rest must not.
  EXPECT_GT(refused, 8 * header / 2);
}

TEST_F(MappedSafetensorsTest, HostileHeadersAreRefusedWithTheReason) {
  struct Case {
    const char* header;
    const char* reason;
  };
  // A parsed value of such depth would overflow the stack when it is printed or destroyed.
  const std::string deep(100'000, '['), closed = deep + std::string(100'000, ']');
  std::string wide = R"({"t":{"dtype":[0)";
  for (int i = 0; i < 10'000; ++i) wide += ",0";
  wide += R"(],"shape":[2],"data_offsets":[0,8]}})";
  const Case cases[] = {
      {"", "not valid JSON"},
      {"{", "not valid JSON"},
      {"[]", "expected a JSON object"},
      {"\xff\xfe", "not valid JSON"},
      {deep.c_str(), "nests more than 3 levels"},
      {closed.c_str(), "nests more than 3 levels"},
      {wide.c_str(), "expected an array of at most 16 sizes"},
      {R"({"t":3})", "expected an object with dtype, shape and data_offsets"},
      {R"({"t":{"dtype":"F32","shape":[2]}})", "expected an object with dtype"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})",
       "expected an object with"},
      {R"({"t":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}})",
       R"(has dtype "F33", expected one of)"},
      {R"({"t":{"dtype":4,"shape":[2],"data_offsets":[0,8]}})", "has dtype 4, expected one of"},
      {R"({"t":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})", "has shape 2, expected an array"},
      {R"({"t":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "expected whole numbers"},
      {R"({"t":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", "expected whole numbers"},
      {R"({"t":{"dtype":"F32","shape":[1e300],"data_offsets":[0,8]}})", "expected whole numbers"},
      {R"({"t":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]}})",
       "expected whole numbers"},
      {R"({"t":{"dtype":"F32","shape":[99999999999999999999999],"data_offsets":[0,8]}})",
       "expected whole numbers"},
      {R"({"t":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})",
       "expected at most"},
      {R"({"t":{"dtype":"F32","shape":[0,281474976710656,281474976710656],"data_offsets":[0,0]}})",
       "expected at most"},
      {R"({"t":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}})",
       "expected an array of at most 16 sizes"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", "expected [begin, end]"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "expected [begin, end]"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}})", "expected [begin, end]"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}})", "has 7 bytes, expected 8"},
      {R"({"t":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}})", "truncated"},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       "has 8 bytes of data, the header expects 4"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551616]}})",
       "expected [begin, end]"},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551611,18446744073709551615]}})",
       "neither overlap nor leave gaps"},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "starts at data byte 4, expected 0"},
      {R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"u":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "neither overlap nor leave gaps"},
      {R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "'t' stands twice"},
      {R"({"t":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "'dtype' stands twice"},
      {R"({"__metadata__":[],"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "__metadata__ is []"},
      {R"({"__metadata__":{"a":1},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "__metadata__ entry 'a' is 1"},
      {R"({"__metadata__":{"a":"x","a":"y"},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "'a' stands twice"},
      {R"({"new\nline":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}})", "'new\\x0aline'"},
  };
  for (const Case& c : cases) {
    put_header(c.header, 8);
    EXPECT_THAT(open_error(),
                AllOf(HasSubstr("weights.safetensors"), HasSubstr(c.reason), Not(HasSubstr("\n"))))
        << std::string_view(c.header).substr(0, 100);
  }
}

TEST_F(MappedSafetensorsTest, AHeaderLengthBeyondTheFileIsRefused) {
  for (const uint64_t length : {uint64_t{9}, uint64_t{1} << 40, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    std::string file(reinterpret_cast<const char*>(&length), 8);
    put(file + "{}      ");
    EXPECT_THAT(open_error(), HasSubstr("header claims " + std::to_string(length) +
                                        " bytes, expected at most 8"));
  }
}

TEST_F(MappedSafetensorsTest, WhatIsNotAFileIsRefused) {
  EXPECT_THAT(open_error(), HasSubstr("cannot open"));
  fs::create_directory(path_);
  EXPECT_THAT(open_error(), HasSubstr("not a regular file"));
}

TEST(Shards, AreFilledInOrderUpToTheLimit) {
  const std::array<uint64_t, 6> bytes = {4, 4, 9, 1, 0, 8};
  EXPECT_THAT(plan_shards(bytes, 8),
              ElementsAre(ElementsAre(0, 1), ElementsAre(2), ElementsAre(3, 4), ElementsAre(5)));
  EXPECT_THAT(plan_shards(bytes, 26), ElementsAre(ElementsAre(0, 1, 2, 3, 4, 5)));
  EXPECT_THAT(plan_shards({}, 8), ElementsAre(ElementsAre()));
  const std::array<uint64_t, 2> huge = {~uint64_t{0}, ~uint64_t{0}};  // sums overflow
  EXPECT_THAT(plan_shards(huge, ~uint64_t{0}), ElementsAre(ElementsAre(0), ElementsAre(1)));
}

TEST(Shards, AreNamedAsTheOriginalsAre) {
  EXPECT_EQ(shard_name(0, 1), "model.safetensors");
  EXPECT_EQ(shard_name(0, 3), "model-00001-of-00003.safetensors");
  EXPECT_EQ(shard_name(123455, 123456), "model-123456-of-123456.safetensors");
}

}  // namespace
}  // namespace natslm
