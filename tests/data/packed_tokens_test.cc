// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/packed_tokens.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/data/train_bpe.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using testing::HasSubstr;
using Ids = std::vector<int32_t>;

std::unique_ptr<Tokenizer> golden() {
  return load_tokenizer(golden_folder());
}

void pack(const std::filesystem::path& path, const Ids& ids, int32_t vocabulary) {
  PackedTokensWriter writer(path, vocabulary, 42);
  for (size_t at = 0; at < ids.size(); at += 3) {
    writer.append(ids.data() + at, static_cast<int64_t>(std::min<size_t>(3, ids.size() - at)));
  }
  writer.commit();
}

Ids all(const PackedTokens& file) {
  Ids ids(file.size());
  file.read(0, file.size(), ids.data());
  return ids;
}

TEST(PackedTokens, NarrowAndWideIdsComeBack) {
  const ScratchFolder folder;
  for (const int32_t vocabulary : {300, 65536, 65537, 200000}) {
    Ids ids(1000);
    Random random(vocabulary);
    for (int32_t& id : ids) id = static_cast<int32_t>(random.below(vocabulary));
    ids[5] = vocabulary - 1;
    pack(folder / "x.tokens", ids, vocabulary);
    const PackedTokens file(folder / "x.tokens");
    EXPECT_EQ(all(file), ids);
    EXPECT_EQ(file.vocabulary(), vocabulary);
    EXPECT_EQ(file.tokenizer_fingerprint(), 42u);
    EXPECT_EQ(std::filesystem::file_size(folder / "x.tokens"),
              64 + ids.size() * (vocabulary > 65536 ? 4 : 2));
    Ids middle(7);
    file.read(100, 7, middle.data());
    EXPECT_EQ(middle, Ids(ids.begin() + 100, ids.begin() + 107));
    EXPECT_THAT(error_of([&] { file.read(994, 7, middle.data()); }), HasSubstr("has 1000 tokens"));
  }
}

TEST(PackedTokens, AnEmptyFileIsWhole) {
  const ScratchFolder folder;
  pack(folder / "x.tokens", {}, 300);
  EXPECT_EQ(PackedTokens(folder / "x.tokens").size(), 0);
}

TEST(PackedTokens, EachFlippedBitIsFound) {
  const ScratchFolder folder;
  Ids ids(11);
  std::iota(ids.begin(), ids.end(), 7);
  pack(folder / "x.tokens", ids, 300);
  const std::string whole = read_file(folder / "x.tokens");
  for (size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] ^= static_cast<char>(1 << bit % 8);
    write_file(folder / "y.tokens", damaged);
    const std::string error = error_of([&] { PackedTokens{folder / "y.tokens"}; });
    ASSERT_THAT(error, HasSubstr("y.tokens")) << "bit " << bit;
    ASSERT_EQ(error.find('\n'), std::string::npos);
  }
}

TEST(PackedTokens, ATruncatedOrLongerFileIsRefusedEvenUnverified) {
  const ScratchFolder folder;
  pack(folder / "x.tokens", Ids(40, 1), 300);
  const std::string whole = read_file(folder / "x.tokens");
  for (size_t size = 0; size < whole.size(); ++size) {
    write_file(folder / "y.tokens", whole.substr(0, size));
    ASSERT_THAT(error_of([&] { PackedTokens(folder / "y.tokens", false); }), HasSubstr("y.tokens"))
        << size;
  }
  write_file(folder / "y.tokens", whole + "xx");
  EXPECT_THAT(error_of([&] { PackedTokens(folder / "y.tokens", false); }), HasSubstr("truncated?"));
}

TEST(PackedTokens, AnIdBeyondTheVocabularyIsFoundWhenRead) {
  const ScratchFolder folder;
  pack(folder / "x.tokens", Ids(40, 1), 300);
  std::string damaged = read_file(folder / "x.tokens");
  damaged[64 + 2 * 9 + 1] = 77;
  write_file(folder / "x.tokens", damaged);
  const PackedTokens file(folder / "x.tokens", false);
  Ids ids(40);
  EXPECT_THAT(error_of([&] { file.read(0, 40, ids.data()); }), HasSubstr("token 9 has id"));
}

TEST(PackedTokens, IdsOutsideTheVocabularyAreNotWritten) {
  const ScratchFolder folder;
  EXPECT_NE(error_of([&] { pack(folder / "x.tokens", {300}, 300); }), "");
  EXPECT_NE(error_of([&] { pack(folder / "x.tokens", {-1}, 300); }), "");
  EXPECT_FALSE(std::filesystem::exists(folder / "x.tokens"));
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(PackCorpus, EqualsEncodingEachDocumentAtOnce) {
  const ScratchFolder folder;
  const auto tokenizer = golden();
  // One file of more than a block, whose block boundary falls inside words and characters.
  std::string large;
  for (uint64_t i = 0; large.size() < (size_t{9} << 20); ++i)
    large += i % 2 ? fuzz_text(i % 50) : damaged_text(i % 50);
  write_file(folder / "t/1.txt", large);
  write_file(folder / "t/2.txt", "small");
  write_file(folder / "t/3.jsonl", "{\"text\": \"one\"}\n{\"text\": \"\"}\n");
  Ids expected;
  for (const std::string& text : {large, std::string("small"), std::string("one"), std::string()}) {
    tokenizer->encode_to(text, expected);
    expected.push_back(tokenizer->end_of_text());
  }
  uint64_t last = 0;
  const Corpus corpus = find_text({folder / "t"});
  const PackSummary summary =
      pack_corpus(corpus, *tokenizer, folder / "x.tokens", [&](uint64_t done, uint64_t total) {
        EXPECT_GE(done, last);
        EXPECT_EQ(total, corpus.bytes());
        last = done;
        return true;
      });
  const PackedTokens file(folder / "x.tokens");
  EXPECT_EQ(all(file), expected);
  EXPECT_EQ(file.tokenizer_fingerprint(), tokenizer->fingerprint());
  EXPECT_EQ(last, corpus.bytes());
  EXPECT_EQ(summary.documents, 4);
  EXPECT_EQ(summary.tokens, file.size());
  EXPECT_EQ(summary.bytes, large.size() + 8);
}

TEST(PackCorpus, StoppedOrFailedItLeavesNoFile) {
  const ScratchFolder folder;
  write_file(folder / "t/a.txt", "text");
  const auto tokenizer = golden();
  const Corpus corpus = find_text({folder / "t"});
  EXPECT_THAT(error_of([&] {
                pack_corpus(corpus, *tokenizer, folder / "x.tokens",
                            [](auto, auto) { return false; });
              }),
              HasSubstr("was stopped"));
  write_file(folder / "t/a.txt", "");  // shorter than when it was found
  EXPECT_THAT(error_of([&] { pack_corpus(corpus, *tokenizer, folder / "x.tokens"); }),
              HasSubstr("shorter"));
  EXPECT_FALSE(std::filesystem::exists(folder / "x.tokens"));
  EXPECT_FALSE(std::filesystem::exists(folder / "x.tokens.tmp"));
}

TEST(PackCorpus, PackedFilesAreNotTakenForText) {
  const ScratchFolder folder;
  pack(folder / "x.tokens", {1, 2, 3}, 300);
  EXPECT_TRUE(is_packed_tokens(folder / "x.tokens"));
  EXPECT_THAT(error_of([&] { find_text({folder / "x.tokens"}); }),
              HasSubstr("packed tokens, not text"));
}

}  // namespace
}  // namespace natslm::data
