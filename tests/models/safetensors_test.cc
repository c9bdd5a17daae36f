// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/safetensors.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "tests/support/safetensors_bytes.h"
#include "tests/support/scratch_folder.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class Safetensors : public ::testing::Test {
 protected:
  void put(std::string_view bytes) const {
    std::ofstream(path_, std::ios::binary).write(bytes.data(), std::ssize(bytes));
  }
  void put_header(std::string_view header, size_t data_bytes) const {
    put(test::safetensors_bytes(header, data_bytes));
  }
  // The message of opening the file, "" if that worked.
  std::string open_error() const {
    try {
      const SafetensorsFile file(path_);
      for (const auto& entry : file.entries()) read_all(file.tensor(entry.name));
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  }
  // Touches every byte, so that a wrong range would be seen by the sanitizer or the memory manager.
  static void read_all(const at::Tensor& tensor) {
    const auto* bytes = static_cast<const volatile unsigned char*>(tensor.const_data_ptr());
    for (size_t i = 0; i < tensor.nbytes(); ++i) static_cast<void>(bytes[i]);
  }

  test::ScratchFolder scratch_;
  const fs::path folder_ = scratch_.path(), path_ = folder_ / "weights.safetensors";
};

NamedTensors small_set() {
  return {{"a", at::arange(6, at::kFloat).reshape({2, 3})},
          {"b.weight", at::arange(3, at::kFloat).to(at::kBFloat16)},
          {"c", at::scalar_tensor(2.5, at::kFloat)},
          {"none", at::empty({0, 4}, at::kFloat)}};
}

TEST_F(Safetensors, WhatIsWrittenIsReadBackWithNamesTypesShapesAndMetadata) {
  NamedTensors all = small_set();
  all.emplace_back("steps", at::full({1}, int64_t{1} << 40, at::kLong));
  all.emplace_back("half", at::arange(5, at::kFloat).to(at::kHalf));
  const Metadata metadata = {{"format", "natslm"}, {"note", "line\nbreak \xc3\xa9 \"quoted\""}};
  write_safetensors(path_, all, metadata);
  const SafetensorsFile file(path_);
  EXPECT_EQ(file.metadata(), metadata);
  EXPECT_EQ(file.entries().size(), all.size());
  for (const auto& [name, tensor] : all) {
    const at::Tensor back = file.tensor(name);
    EXPECT_EQ(back.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(back.sizes(), tensor.sizes()) << name;
    EXPECT_TRUE(at::equal(back, tensor)) << name;
  }
}

TEST_F(Safetensors, StridedTensorsAreWrittenByValue) {
  const at::Tensor base = at::randn({4, 6});
  write_safetensors(path_, {{"t", base.t()}, {"part", base.slice(1, 1, 4)}});
  const SafetensorsFile file(path_);
  EXPECT_TRUE(at::equal(file.tensor("t"), base.t()));
  EXPECT_TRUE(at::equal(file.tensor("part"), base.slice(1, 1, 4)));
}

TEST_F(Safetensors, AnEmptySetIsAValidFile) {
  write_safetensors(path_, {});
  EXPECT_TRUE(SafetensorsFile(path_).entries().empty());
}

TEST_F(Safetensors, TheSameTensorsGiveTheSameBytes) {
  write_safetensors(path_, small_set(), {{"k", "v"}});
  const std::string first = read_file(path_);
  write_safetensors(path_, small_set(), {{"k", "v"}});
  EXPECT_EQ(first, read_file(path_));
}

TEST_F(Safetensors, TensorsOutliveTheFileObjectAndTheFileItself) {
  write_safetensors(path_, small_set());
  at::Tensor a;
  {
    const SafetensorsFile file(path_);
    a = file.tensor("a");
  }
  fs::remove(path_);
  EXPECT_TRUE(at::equal(a, at::arange(6, at::kFloat).reshape({2, 3})));
}

TEST_F(Safetensors, WritingToATensorLeavesTheFileAlone) {
  write_safetensors(path_, small_set());
  const std::string before = read_file(path_);
  SafetensorsFile(path_).tensor("a").fill_(7);
  EXPECT_EQ(before, read_file(path_));
}

TEST_F(Safetensors, UnalignedDataOfOtherWritersIsRead) {
  // One byte of U8 first, so that the float after it starts at an odd address.
  put_header(R"({"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
             R"("f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})",
             9);
  const SafetensorsFile file(path_);
  EXPECT_TRUE(at::equal(file.tensor("f"), at::full({2}, 0.0f)));
}

TEST_F(Safetensors, AskingForAnotherNameOrShapeSaysWhatIsThere) {
  write_safetensors(path_, small_set());
  const SafetensorsFile file(path_);
  const auto message = [](auto call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(message([&] { file.tensor("nope"); }),
              AllOf(HasSubstr("no tensor 'nope'"), HasSubstr("it has 4 tensors")));
  EXPECT_THAT(message([&] {
                file.tensor("a", {3, 2});
              }),
              AllOf(HasSubstr("tensor 'a' has shape [2, 3], expected [3, 2]")));
  EXPECT_THAT(message([&] {
                write_safetensors(path_, {{"x", at::full({1}, 1, at::kInt)}});
                SafetensorsFile(path_).tensor("x", {1});
              }),
              HasSubstr("has dtype Int, expected a floating-point one"));
  EXPECT_TRUE(at::equal(file.tensor("a", {2, 3}), at::arange(6, at::kFloat).reshape({2, 3})));
}

TEST_F(Safetensors, WhatCannotBeWrittenIsRefusedAndTheOldFileStays) {
  write_safetensors(path_, small_set());
  const std::string before = read_file(path_);
  const at::Tensor one = at::full({1}, 1.0f);
  EXPECT_THROW(write_safetensors(path_, {{"x", one}, {"x", one}}), Error);
  EXPECT_THROW(write_safetensors(path_, {{"__metadata__", one}}), Error);
  EXPECT_THROW(write_safetensors(path_, {{"bad\xff", one}}), Error);
  EXPECT_THROW(write_safetensors(path_, {{"x", at::full({1}, true, at::kBool)}}), Error);
  EXPECT_THROW(write_safetensors(folder_ / "no" / "folder", {{"x", one}}), Error);
  EXPECT_EQ(before, read_file(path_));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1) << "a temporary file was left";
}

}  // namespace
}  // namespace natslm::models
