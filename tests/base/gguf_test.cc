// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "tests/support/error_of.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/memory_file.h"

namespace natslm {
namespace {

using test::error_of;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using Type = GgufFile::ValueType;

std::string small_file() {
  return read_file(NATSLM_TEST_SOURCE "/tests/golden/gguf/small.gguf");
}

// The message of opening the file and reading all of it, "" if that worked.
std::string open_error(const std::string& bytes) {
  const MemoryFile file(bytes);
  return error_of([&] {
    const GgufFile gguf = GgufFile::open(file.path());
    volatile std::byte last{};
    for (const auto& [key, value] : gguf.metadata())
      for (const std::byte b : value.bytes) last = b;
    for (const GgufFile::Tensor& t : gguf.tensors())
      for (const std::byte b : t.bytes) last = b;
    static_cast<void>(last);
  });
}

TEST(Gguf, AFileOfTheReferenceWriterIsReadWithAllItsValueTypes) {
  const MemoryFile bytes(small_file());
  const GgufFile file = GgufFile::open(bytes.path());
  EXPECT_EQ(file.version(), 3);
  EXPECT_EQ(file.get_string("general.architecture"), "llama");
  EXPECT_EQ(file.get_u32("test.u8"), 200);
  EXPECT_EQ(file.get_i64("test.i8"), -100);
  EXPECT_EQ(file.get_u32("test.u16"), 60000);
  EXPECT_EQ(file.get_i64("test.i16"), -30000);
  EXPECT_EQ(file.get_u32("test.u32"), 4000000000u);
  EXPECT_EQ(file.get_i64("test.i32"), -2000000000);
  EXPECT_EQ(file.get_i64("test.i64"), -9000000000000000000);
  EXPECT_EQ(file.get_f32("test.f32"), 0.1f);
  EXPECT_EQ(file.get_f32("test.f64"), static_cast<float>(-2.5e-300));
  EXPECT_TRUE(file.get_bool("test.bool"));
  EXPECT_EQ(file.get_string("test.string"), "h\xc3\xa9llo \"w\xc3\xb6rld\"\n");
  EXPECT_THAT(file.get_strings("test.strings"),
              ElementsAre("a", "", "\xc4\xa0the", "\xf0\x9f\x98\x80"));
  EXPECT_THAT(file.get_i32s("test.i32s"), ElementsAre(-1, 0, 7));
  EXPECT_THAT(file.get_f32s("test.f32s"), ElementsAre(0.5f, -1.25f));
  EXPECT_THAT(file.get_bools("test.bools"), ElementsAre(true, false, true));
  const auto nested = file.get_arrays("test.nested");
  ASSERT_EQ(nested.size(), 2);
  EXPECT_EQ(nested[0].element, Type::kI32);
  EXPECT_EQ(nested[0].count, 2);
  EXPECT_EQ(nested[1].count, 1);
  EXPECT_EQ(nested[1].bytes[0], std::byte{3});
}

TEST(Gguf, AFileOfTheReferenceWriterHasATensorOfEveryType) {
  const MemoryFile bytes(small_file());
  const GgufFile file = GgufFile::open(bytes.path());
  size_t types = 0;
  for (const WeightTypeFacts& type : kWeightTypes) {
    if (type.gguf < 0) continue;
    ++types;
    const GgufFile::Tensor& t = file.tensor(type.name);
    EXPECT_EQ(t.type, type.type);
    EXPECT_THAT(t.shape, ElementsAre(2, std::max<int64_t>(type.block, 3))) << type.name;
    EXPECT_EQ(t.bytes.size(), 2 * t.shape[1] / type.block * type.bytes) << type.name;
  }
  EXPECT_EQ(file.tensors().size(), types);
  EXPECT_EQ(file.find_tensor("nope"), nullptr);
  EXPECT_THAT(error_of([&] { file.tensor("nope"); }),
              AllOf(HasSubstr("no tensor 'nope'"), HasSubstr("it has 28 tensors")));
}

TEST(Gguf, VersionTwoIsReadAsVersionThree) {
  std::string bytes = small_file();
  bytes[4] = 2;
  const MemoryFile file(bytes);
  EXPECT_EQ(GgufFile::open(file.path()).version(), 2);
  EXPECT_EQ(GgufFile::open(file.path()).get_u32("test.u8"), 200);
}

TEST(Gguf, CopiesKeepTheMapping) {
  std::string_view text;
  std::vector<GgufFile> copies;
  {
    const MemoryFile bytes(small_file());
    const GgufFile file = GgufFile::open(bytes.path());
    text = file.get_string("general.architecture");
    copies.push_back(file);
  }
  EXPECT_EQ(text, "llama");
  EXPECT_EQ(copies[0].get_u32("test.u8"), 200);
}

TEST(Gguf, AGetterOfAnotherKindSaysWhatIsThere) {
  const MemoryFile bytes(small_file());
  const GgufFile file = GgufFile::open(bytes.path());
  EXPECT_THAT(error_of([&] { file.get_u32("test.string"); }),
              HasSubstr("metadata 'test.string' is of type string, expected a whole number"));
  EXPECT_THAT(error_of([&] { file.get_u32("test.i32s"); }),
              HasSubstr("is of type array of I32, expected a whole number"));
  EXPECT_THAT(error_of([&] { file.get_u32("test.f32"); }), HasSubstr("is of type F32"));
  EXPECT_THAT(error_of([&] { file.get_u32("test.i8"); }),
              HasSubstr("holds -100, expected a whole number from 0 to 4294967295"));
  EXPECT_THAT(error_of([&] { file.get_u32("test.u64"); }), HasSubstr("holds 10000000000000000000"));
  EXPECT_THAT(error_of([&] { file.get_i64("test.u64"); }), HasSubstr("holds 10000000000000000000"));
  EXPECT_THAT(error_of([&] { file.get_f32("test.u8"); }), HasSubstr("expected a real number"));
  EXPECT_THAT(error_of([&] { file.get_bool("test.u8"); }), HasSubstr("expected a bool"));
  EXPECT_THAT(error_of([&] { file.get_string("test.u8"); }), HasSubstr("expected a string"));
  EXPECT_THAT(error_of([&] { file.get_strings("test.string"); }),
              HasSubstr("is of type string, expected an array of strings"));
  EXPECT_THAT(error_of([&] { file.get_i32s("test.f32s"); }), HasSubstr("array of F32"));
  EXPECT_THAT(error_of([&] { file.get_i32s("test.strings"); }), HasSubstr("array of string"));
  EXPECT_THAT(error_of([&] { file.get_f32s("test.strings"); }), HasSubstr("array of string"));
  EXPECT_THAT(error_of([&] { file.get_f32s("test.i32s"); }), HasSubstr("array of I32"));
  EXPECT_THAT(error_of([&] { file.get_bools("test.i32s"); }),
              HasSubstr("expected an array of bools"));
  EXPECT_THAT(error_of([&] { file.get_arrays("test.i32s"); }),
              HasSubstr("expected an array of arrays"));
  EXPECT_THAT(error_of([&] { file.get_string("nope"); }),
              HasSubstr("has no metadata 'nope', expected a string"));
}

TEST(Gguf, WhatIsMissingHasItsDefaultAndWhatIsWrongHasNot) {
  const MemoryFile bytes(small_file());
  const GgufFile file = GgufFile::open(bytes.path());
  EXPECT_EQ(file.get_u32("nope", 7), 7);
  EXPECT_EQ(file.get_i64("nope", -7), -7);
  EXPECT_EQ(file.get_f32("nope", 0.5f), 0.5f);
  EXPECT_EQ(file.get_string("nope", "x"), "x");
  EXPECT_TRUE(file.get_bool("nope", true));
  EXPECT_EQ(file.get_u32("test.u8", 7), 200);
  EXPECT_EQ(file.get_string("general.architecture", "x"), "llama");
  EXPECT_NE(error_of([&] { file.get_u32("test.string", 7); }), "");
}

TEST(Gguf, AFileTruncatedAnywhereIsRefusedInOneLine) {
  const std::string whole = small_file();
  const MemoryFile undamaged(whole);
  const GgufFile file = GgufFile::open(undamaged.path());
  const auto last = file.tensors().back().bytes;  // only padding follows
  const size_t end = last.data() + last.size() - file.mapped()->data();
  for (size_t size = 0; size < end; ++size) {
    const std::string error = open_error(whole.substr(0, size));
    ASSERT_NE(error, "") << "cut to " << size << " bytes";
    ASSERT_THAT(error, Not(HasSubstr("\n"))) << "cut to " << size << " bytes";
  }
}

TEST(Gguf, AFlippedHeaderBitIsRefusedOrHarmless) {
  const std::string whole = small_file();
  const MemoryFile undamaged(whole);
  const GgufFile file = GgufFile::open(undamaged.path());
  size_t header = file.tensors().front().bytes.data() - file.mapped()->data(), refused = 0;
  for (size_t bit = 0; bit < 8 * header; ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    const std::string error = open_error(flipped);
    ASSERT_THAT(error, Not(HasSubstr("\n"))) << "bit " << bit << ": " << error;
    refused += !error.empty();
  }
  EXPECT_GT(refused, 8 * header / 3);
}

TEST(Gguf, HostileFilesAreRefusedWithTheReason) {
  constexpr uint64_t kHuge = uint64_t{1} << 60;
  const std::string one = raw(uint32_t{1});
  struct Case {
    const char* reason;
    std::function<void(GgufBuilder&)> make;
  };
  const Case cases[] = {
      {"GGUF version 1, expected 2 or 3", [](auto& b) { b.version = 1; }},
      {"GGUF version 4, expected 2 or 3", [](auto& b) { b.version = 4; }},
      {"big-endian", [](auto& b) { b.version = 0x03000000; }},
      {"the tensor table claims 1152921504606846976 entries", [&](auto& b) { b.tensors = kHuge; }},
      {"the metadata claims 18446744073709551615 entries", [](auto& b) { b.entries = ~0ull; }},
      {"the tensor table claims 20 entries", [](auto& b) { b.tensors = 20; }},
      {"a metadata key",
       [](auto& b) {
         b.entries = b.alignment = 1;
         b.data = raw(kHuge) + "12345";
       }},
      {"'k' has value type 13", [&](auto& b) { b.value("k", Type{13}, one); }},
      {"'k' has value type 4294967295", [&](auto& b) { b.array("k", Type{~0u}, 1, one); }},
      {"'k' at byte", [](auto& b) { b.value("k", Type::kString, raw(kHuge)); }},
      {"'k' at byte", [](auto& b) { b.value("k", Type::kString, raw(~uint64_t{0} - 3)); }},
      {"'k' claims 1152921504606846976", [](auto& b) { b.array("k", Type::kU8, kHuge, ""); }},
      {"'k' claims 2305843009213693952",  // times 8 bytes: 2^64
       [](auto& b) { b.array("k", Type::kU64, kHuge * 2, ""); }},
      {"'k' claims", [](auto& b) { b.array("k", Type::kString, kHuge, raw("a")); }},
      {"'k' claims", [](auto& b) { b.array("k", Type::kArray, kHuge, ""); }},
      {"'k' holds a bool of 2", [](auto& b) { b.value("k", Type::kBool, "\2"); }},
      {"'k' holds a bool of 255", [](auto& b) { b.array("k", Type::kBool, 2, "\1\xff"); }},
      {"'k' stands twice",
       [&](auto& b) { b.value("k", Type::kU32, one).value("k", Type::kU32, one); }},
      {"has a key of 0 bytes", [&](auto& b) { b.value("", Type::kU32, one); }},
      {"has a key of 70000 bytes",
       [&](auto& b) { b.value(std::string(70000, 'k'), Type::kU32, one); }},
      {"nests more than 8 arrays",
       [](auto& b) {
         std::string inner;
         for (int i = 0; i < 100'000; ++i)
           inner += raw(static_cast<uint32_t>(Type::kArray)) + raw(uint64_t{1});
         b.value("k", Type::kArray, inner);
       }},
      {"'general.alignment' is 0",
       [](auto& b) { b.value("general.alignment", Type::kU32, raw(0u)); }},
      {"'general.alignment' is 24",
       [](auto& b) { b.value("general.alignment", Type::kU32, raw(24u)); }},
      {"'general.alignment' is 2147483648",
       [](auto& b) { b.value("general.alignment", Type::kU32, raw(1u << 31)); }},
      {"'general.alignment' is of type string",
       [](auto& b) { b.value("general.alignment", Type::kString, raw("x")); }},
      {"tensor 't' has 5 dimensions",
       [](auto& b) {
         b.tensor({"t", {1, 1, 1, 1, 1}});
       }},
      {"tensor 't' has a size of 1152921504606846976",
       [](auto& b) {
         b.tensor({"t", {kHuge}});
       }},
      {"tensor 't' has a size of 4294967296 in dimension 1",
       [](auto& b) {
         b.tensor({"t", {1ull << 32, 1ull << 32}});
       }},
      {"tensor 't' has a size of 4294967296 in dimension 2",
       [](auto& b) {
         b.tensor({"t", {0, 1ull << 32, 1ull << 32}});
       }},
      {"tensor 't' has type number 4,",
       [](auto& b) {
         b.tensor({"t", {32}, 4});
       }},
      {"tensor 't' has type number 4294967295,",
       [](auto& b) {
         b.tensor({"t", {32}, ~0u});
       }},
      {"tensor 't' of type Q4_0 has rows of 33 elements",
       [](auto& b) {
         b.tensor({"t", {33}, 2});
       }},
      {"tensor 't' of type Q4_0 has rows of 1 elements",
       [](auto& b) {
         b.tensor({"t", {}, 2});
       }},
      {"tensor 't' of type Q4_K has rows of 32 elements",
       [](auto& b) {
         b.tensor({"t", {32, 8}, 12});
       }},
      {"tensor 't' has 512 bytes from data byte 0 on, but the file holds 256",
       [](auto& b) {
         b.tensor({"t", {128}});
       }},
      {"from data byte 18446744073709551584 on",
       [](auto& b) {
         b.tensor({"t", {8}, 0, ~0ull - 31});
       }},
      {"tensor 't' starts at data byte 4, expected a multiple of the alignment 32",
       [](auto& b) {
         b.tensor({"t", {8}, 0, 4});
       }},
      {"tensor 'u' starts at data byte 32, but tensor 't' ends at 64",
       [](auto& b) {
         b.tensor({"t", {16}}).tensor({"u", {8}, 0, 32});
       }},
      {"tensor 'u' starts at data byte 0, but tensor 't' ends at 32",
       [](auto& b) {
         b.tensor({"t", {8}}).tensor({"u", {16}});
       }},
      {"tensor 't' stands twice",
       [](auto& b) {
         b.tensor({"t", {8}}).tensor({"t", {8}, 0, 32});
       }},
      {"has a name of 0 bytes",
       [](auto& b) {
         b.tensor({"", {8}});
       }},
      {"'new\\x0aline' has 5 dimensions",
       [](auto& b) {
         b.tensor({"new\nline", {1, 1, 1, 1, 1}});
       }},
  };
  for (const Case& c : cases) {
    GgufBuilder builder;
    builder.data = std::string(256, '\0');
    c.make(builder);
    EXPECT_THAT(open_error(builder.bytes()),
                AllOf(HasSubstr("/proc/self/fd/"), HasSubstr(c.reason), Not(HasSubstr("\n"))));
  }
}

TEST(Gguf, WhatIsNotAGgufFileIsRefused) {
  EXPECT_THAT(open_error(""), HasSubstr("the mark 'GGUF' at byte 0 needs 4 bytes"));
  EXPECT_THAT(open_error("GGML" + std::string(64, '\0')), HasSubstr("does not start with 'GGUF'"));
  EXPECT_THAT(error_of([] { GgufFile::open("/nowhere/model.gguf"); }), HasSubstr("cannot open"));
  EXPECT_THAT(error_of([] { GgufFile::open("/tmp"); }), HasSubstr("not a regular file"));
}

TEST(Gguf, OddButValidFilesAreRead) {
  GgufBuilder empty;
  EXPECT_EQ(open_error(empty.bytes()), "") << "no metadata, no tensors, no data";
  empty.value("k", Type::kU8, "\1");
  const std::string header = empty.bytes();
  EXPECT_EQ(open_error(header.substr(0, 8 + 16 + 8 + 1 + 4 + 1)), "") << "no padding, no tensors";

  GgufBuilder odd;  // a scalar, an empty tensor, a gap, an empty array, bytes after the end
  odd.data = std::string(256, '\1');
  odd.tensor({"scalar", {}, 0, 64}).tensor({"none", {0, 7}, 0, 96}).tensor({"five", {5}, 0, 128});
  odd.array("k", Type::kString, 0, "").array("nested", Type::kArray, 0, "");
  const MemoryFile bytes(odd.bytes());
  const GgufFile file = GgufFile::open(bytes.path());
  EXPECT_THAT(file.tensor("scalar").shape, ElementsAre());
  EXPECT_EQ(file.tensor("scalar").bytes.size(), 4);
  EXPECT_THAT(file.tensor("none").shape, ElementsAre(7, 0));
  EXPECT_TRUE(file.tensor("none").bytes.empty());
  EXPECT_THAT(file.get_strings("k"), ElementsAre());
  EXPECT_TRUE(file.get_arrays("nested").empty());
}

}  // namespace
}  // namespace natslm
