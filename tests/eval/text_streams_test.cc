// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/text_streams.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "natslm/base/error.h"
#include "natslm/data/packed_tokens.h"
#include "tests/support/byte_tokenizer.h"

namespace natslm::eval {
namespace {

class TextStreams : public ::testing::Test {
 protected:
  TextStreams() {
    folder_ = std::filesystem::path(::testing::TempDir()) / "natslm_text_streams";
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~TextStreams() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return folder_ / name;
  }
  std::filesystem::path folder_;
  test::ByteTokenizer tokenizer_;
};

TEST_F(TextStreams, EachFileIsOneStream) {
  const auto a = write("a.txt", "first"), b = write("b.txt", "second");
  const Streams streams = text_streams({a, b}, tokenizer_);
  ASSERT_EQ(streams.size(), 2u);
  EXPECT_EQ(tokenizer_.decode(streams[0]), "first");
  EXPECT_EQ(tokenizer_.decode(streams[1]), "second");
}

TEST_F(TextStreams, BytesThatAreNoUtf8AreKept) {
  const auto a = write("a.txt", "\xFF\x80 ok");
  EXPECT_EQ(tokenizer_.decode(text_streams({a}, tokenizer_)[0]), "\xFF\x80 ok");
}

TEST_F(TextStreams, ReadingStopsOnceThereIsEnough) {
  const auto a = write("a.txt", std::string(100, 'a')), b = write("b.txt", std::string(100, 'b'));
  EXPECT_EQ(text_streams({a, b}, tokenizer_, 50).size(), 1u);
  EXPECT_EQ(text_streams({a, b}, tokenizer_, 150).size(), 2u);
}

TEST_F(TextStreams, PackedTokensAreReadIfTheTokenizerIsTheSame) {
  const auto path = folder_ / "packed.bin";
  const std::vector<int32_t> ids{1, 2, 3, 200};
  data::PackedTokensWriter writer(path, 256, 77);
  writer.append(ids.data(), 4);
  writer.commit();
  EXPECT_EQ(text_streams({path}, tokenizer_), Streams{ids});

  const auto other = folder_ / "other.bin";
  data::PackedTokensWriter foreign(other, 256, 78);
  foreign.append(ids.data(), 4);
  foreign.commit();
  EXPECT_THROW(text_streams({other}, tokenizer_), Error);
}

TEST_F(TextStreams, NoTextIsAnError) {
  EXPECT_THROW(text_streams({}, tokenizer_), Error);
  EXPECT_THROW(text_streams({folder_ / "not there"}, tokenizer_), Error);
  EXPECT_THROW(text_streams({folder_}, tokenizer_), Error);
}

}  // namespace
}  // namespace natslm::eval
