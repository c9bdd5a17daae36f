// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/weight_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <string>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/scratch_folder.h"

namespace natslm {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

class WeightFilesTest : public testing::Test {
 protected:
  // A .safetensors file with one vector of bytes a name, all of the name's first letter.
  void write_safetensors(const std::string& file, const std::vector<std::string>& names) const {
    std::vector<SafetensorsWriter::Tensor> tensors;
    for (const std::string& name : names) tensors.push_back({name, WeightType::kU8, {3}});
    SafetensorsWriter out(folder_ / file, tensors, {{"from " + file, "yes"}});
    for (const size_t i : out.order())
      out.write(std::vector<std::byte>(3, static_cast<std::byte>(names[i][0])));
    out.commit();
  }
  void write_index(const std::string& json) const {
    write_atomically(folder_ / "model.safetensors.index.json", json);
  }
  // Part `part` of `parts` (0: says nothing of parts), with one tensor.
  void write_gguf(const std::string& file, const std::string& tensor, uint16_t part = 0,
                  uint16_t parts = 0, int32_t tensors = 0) const {
    using Type = GgufFile::ValueType;
    GgufBuilder builder;
    builder.value("general.name", Type::kString, raw(tensor));
    if (parts > 0) {
      builder.value("split.no", Type::kU16, raw(part));
      builder.value("split.count", Type::kU16, raw(parts));
      builder.value("split.tensors.count", Type::kI32, raw(tensors));
    }
    builder.tensor({tensor, {4, 2}, 0, 0});
    builder.data = std::string(32, tensor[0]);
    write_atomically(folder_ / file, builder.bytes());
  }

  std::vector<std::string> names(const fs::path& path) const {
    std::vector<std::string> result;
    const WeightFiles files = WeightFiles::open(path);
    for (const auto& entry : files.entries()) result.emplace_back(entry.name);
    return result;
  }
  std::string open_error(const fs::path& path) const {
    try {
      WeightFiles::open(path);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  test::ScratchFolder scratch_;
  const fs::path folder_ = scratch_.path();
};

constexpr auto kGoodIndex =
    R"({"metadata":{"total_size":9},"weight_map":{"a":"one.safetensors","b":"two.safetensors",)"
    R"("c":"one.safetensors"}})";

TEST_F(WeightFilesTest, AFolderIsOpenedByWhatItHolds) {
  EXPECT_THAT(open_error(folder_), HasSubstr("holds no weights"));
  write_gguf("model.gguf", "g");
  EXPECT_THAT(names(folder_), ElementsAre("g"));
  EXPECT_NE(WeightFiles::open(folder_).gguf(), nullptr);
  write_gguf("other.gguf", "h");
  EXPECT_THAT(open_error(folder_), AllOf(HasSubstr("2 .gguf files"), HasSubstr("other.gguf")));
  write_safetensors("one.safetensors", {"a", "c"});
  write_safetensors("two.safetensors", {"b"});
  write_index(kGoodIndex);
  EXPECT_THAT(names(folder_), ElementsAre("a", "c", "b"));
  write_safetensors("model.safetensors", {"m"});
  EXPECT_THAT(names(folder_), ElementsAre("m"));
  EXPECT_EQ(WeightFiles::open(folder_).gguf(), nullptr);
  EXPECT_EQ(WeightFiles::open(folder_).path(), folder_ / "model.safetensors");
}

TEST_F(WeightFilesTest, AFileIsOpenedByNameOrBeginning) {
  write_gguf("weights", "g");
  EXPECT_THAT(names(folder_ / "weights"), ElementsAre("g"));
  write_safetensors("adapter", {"a"});
  EXPECT_THAT(names(folder_ / "adapter"), ElementsAre("a"));
  EXPECT_THAT(open_error(folder_ / "none"), HasSubstr("cannot open"));
}

TEST_F(WeightFilesTest, ShardsAreOneModelAndCopiesKeepTheirMappings) {
  write_safetensors("one.safetensors", {"a", "c"});
  write_safetensors("two.safetensors", {"b"});
  write_index(kGoodIndex);
  std::vector<WeightFiles> copies;
  copies.push_back(WeightFiles::open(folder_ / "model.safetensors.index.json"));
  copies.push_back(copies[0]);
  copies.erase(copies.begin());
  const WeightFiles& files = copies[0];
  EXPECT_EQ(files.total_bytes(), 9);
  EXPECT_EQ(files.metadata().size(), 2);
  const WeightFiles::Entry& b = files.entry("b");
  EXPECT_THAT(b.shape, ElementsAre(3));
  EXPECT_EQ(b.bytes[2], std::byte{'b'});
  EXPECT_EQ(b.file->path().filename(), "two.safetensors");
  EXPECT_EQ(files.find("d"), nullptr);
  EXPECT_THROW(files.entry("d"), Error);
  const int64_t other[] = {1, 3};
  try {
    WeightFiles::check_shape(b, other);
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("tensor 'b' has shape [3], expected [1, 3]"));
  }
}

TEST_F(WeightFilesTest, AnIndexThatDoesNotFitItsFilesIsRefused) {
  write_safetensors("one.safetensors", {"a", "c"});
  write_safetensors("two.safetensors", {"b"});
  write_safetensors("three.safetensors", {"b", "d"});
  struct Case {
    std::string index, reason;
  };
  const Case cases[] = {
      {"", "not valid JSON"},
      {"{", "not valid JSON"},
      {"\xff", "not valid JSON"},
      {"3", "has no object 'weight_map'"},
      {"{}", "has no object 'weight_map'"},
      {"[]", "holds a list"},
      {R"({"weight_map":3})", "has no object 'weight_map'"},
      {R"({"weight_map":{"a":3}})", "tensor 'a' has no file name"},
      {R"({"weight_map":{"a":"/etc/passwd"}})", "expected the name of a file in the same folder"},
      {R"({"weight_map":{"a":"../one.safetensors"}})", "in the same folder"},
      {R"({"weight_map":{"a":".."}})", "in the same folder"},
      {R"({"weight_map":{"a":""}})", "in the same folder"},
      {R"({"weight_map":{"a":"one.safetensors\u0000"}})", "in the same folder"},
      {R"({"weight_map":{"a":"one\nsafetensors"}})", "in the same folder"},
      {R"({"weight_map":{"a":"none.safetensors"}})", "none.safetensors: cannot open"},
      {R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})", "'a' stands twice"},
      {R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors"}})",
       "tensor 'b' should be in 'one.safetensors', but is not there"},
      {R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}})",
       "tensor 'b' should be in 'one.safetensors', but is in 'two.safetensors'"},
      {R"({"weight_map":{"a":"one.safetensors"}})", "does not know tensor 'c'"},
      {R"({"weight_map":{"b":"two.safetensors","d":"three.safetensors"}})",
       "tensor 'b' stands in three.safetensors too"},
      {R"({"a":{"b":{"c":1}}})", "nests more than 2 levels"},
  };
  for (const Case& c : cases) {
    write_index(c.index);
    EXPECT_THAT(open_error(folder_ / "model.safetensors.index.json"),
                AllOf(HasSubstr(c.reason), Not(HasSubstr("\n"))))
        << c.index;
  }
}

TEST_F(WeightFilesTest, PartsOfAGgufModelAreFoundByName) {
  write_gguf("m-00001-of-00003.gguf", "a", 0, 3, 3);
  write_gguf("m-00002-of-00003.gguf", "b", 1, 3, 3);
  EXPECT_THAT(open_error(folder_), HasSubstr("m-00003-of-00003.gguf: cannot open"));
  write_gguf("m-00003-of-00003.gguf", "c", 2, 3, 3);
  EXPECT_THAT(names(folder_), ElementsAre("a", "b", "c"));
  EXPECT_THAT(names(folder_ / "m-00002-of-00003.gguf"), ElementsAre("a", "b", "c"));
  const WeightFiles files = WeightFiles::open(folder_);
  EXPECT_EQ(files.gguf()->get_string("general.name"), "a");
  const WeightFiles copy = files;
  EXPECT_EQ(copy.entry("c").bytes[0], std::byte{'c'});
  EXPECT_THAT(copy.entry("c").shape, ElementsAre(2, 4));

  write_gguf("m-00003-of-00003.gguf", "c", 1, 3, 3);
  EXPECT_THAT(open_error(folder_), HasSubstr("is part 2 of 3, expected part 3 of 3"));
  write_gguf("m-00003-of-00003.gguf", "a", 2, 3, 3);
  EXPECT_THAT(open_error(folder_), HasSubstr("tensor 'a' stands in m-00001-of-00003.gguf too"));
  fs::rename(folder_ / "m-00001-of-00003.gguf", folder_ / "first.gguf");
  EXPECT_THAT(open_error(folder_ / "first.gguf"),
              HasSubstr("its name must end in '-00001-of-00003.gguf'"));
  write_gguf("n-00001-of-00002.gguf", "a", 0, 2, 5);
  write_gguf("n-00002-of-00002.gguf", "b", 1, 2, 5);
  EXPECT_THAT(open_error(folder_ / "n-00001-of-00002.gguf"),
              HasSubstr("hold 2 tensors, expected 5"));
}

}  // namespace
}  // namespace natslm
