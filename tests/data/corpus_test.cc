// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/corpus.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> names(const Corpus& corpus) {
  std::vector<std::string> result;
  for (const TextSource& source : corpus.sources) result.push_back(source.name);
  return result;
}

std::vector<std::string> documents(const Corpus& corpus) {
  TextStream stream(corpus);
  std::vector<std::string> result;
  std::string block, document;
  bool ends = false;
  while (stream.next(block, ends)) {
    document += block;
    if (ends) result.push_back(std::exchange(document, ""));
  }
  EXPECT_EQ(document, "");
  EXPECT_EQ(stream.bytes_read(), corpus.bytes());
  return result;
}

TEST(Corpus, AFolderIsSearchedForTextInTheOrderOfNames) {
  const ScratchFolder folder;
  write_file(folder / "t/b.txt", "b");
  write_file(folder / "t/a/z.py", "z");
  write_file(folder / "t/a.c", "ac");
  write_file(folder / "t/.git/config", "hidden folder");
  write_file(folder / "t/.hidden", "hidden");
  write_file(folder / "t/binary", std::string_view("\x7f"
                                                   "ELF\0",
                                                   5));
  write_file(folder / "t/empty.txt", "");
  write_file(folder / "t/latin1.txt", "caf\xE9");
  std::filesystem::create_directory_symlink(folder / "t", folder / "t/a/loop");
  const Corpus corpus = find_text({folder / "t"});
  EXPECT_THAT(names(corpus), ElementsAre("a.c", "a/z.py", "b.txt", "latin1.txt"));
  EXPECT_EQ(corpus.skipped_files, 2);
  EXPECT_THAT(documents(corpus), ElementsAre("ac", "z", "b", "caf\xE9"));
}

TEST(Corpus, AFileNamedByTheUserIsTakenByteForByte) {
  const ScratchFolder folder;
  const std::string bytes("zero\0, bad \xFF\xC3, \r\n end", 22);
  write_file(folder / ".odd", bytes);
  EXPECT_THAT(documents(find_text({folder / ".odd"})), ElementsAre(bytes));
}

TEST(Corpus, ALargeFileComesInBlocks) {
  const ScratchFolder folder;
  std::string text(9 << 20, 'x');
  for (size_t i = 0; i < text.size(); i += 97) text[i] = static_cast<char>(i / 97);
  write_file(folder / "large.txt", text);
  TextStream stream(find_text({folder / "large.txt"}));
  std::string block, all;
  bool ends = false;
  int blocks = 0;
  while (stream.next(block, ends)) {
    all += block;
    EXPECT_EQ(ends, ++blocks == 3);
  }
  EXPECT_EQ(blocks, 3);
  EXPECT_EQ(all, text);
}

TEST(Corpus, MissingAndEmptyTextIsRefusedWithARemedy) {
  const ScratchFolder folder;
  EXPECT_THAT(error_of([&] { find_text({folder / "none.txt"}); }),
              HasSubstr("none.txt: no such file"));
  EXPECT_THAT(error_of([&] { find_text({folder.path()}); }), HasSubstr("name a text file"));
  write_file(folder / "empty.txt", "");
  EXPECT_THAT(error_of([&] { find_text({folder / "empty.txt"}); }), HasSubstr("empty"));
  write_file(folder / "d/binary", std::string_view("\0", 1));
  EXPECT_THAT(error_of([&] { find_text({folder / "d"}); }),
              HasSubstr("1 binary or empty files were skipped"));
  EXPECT_THAT(error_of([&] { find_text({}); }), HasSubstr("no text was given"));
}

TEST(JsonLines, EachLineIsADocument) {
  const ScratchFolder folder;
  write_file(folder / "a.jsonl",
             "\xEF\xBB\xBF{\"text\": \"one\", \"id\": 1}\r\n"
             "\n"
             "   \t\r\n"
             "{\"id\": 2, \"text\": \"t\\u00e9\\n\\ud83d\\ude00\\u0000.\"}\n"
             "{\"text\": \"\"}\n"
             "{\"meta\": {\"text\": \"inner\"}, \"text\": \"no newline at the end\"}");
  EXPECT_THAT(documents(find_text({folder / "a.jsonl"})),
              ElementsAre("one", std::string("t\xC3\xA9\n\xF0\x9F\x98\x80\0.", 10), "",
                          "no newline at the end"));
}

TEST(JsonLines, BadLinesAreNamed) {
  const ScratchFolder folder;
  const auto error = [&](const std::string& line) {
    write_file(folder / "a.jsonl", "{\"text\": \"fine\"}\n" + line + "\n{\"text\": \"fine\"}\n");
    return error_of([&] { documents(find_text({folder / "a.jsonl"})); });
  };
  for (const std::string bad : {"{\"text\": \"cut", "{\"text\": \"a\"} more", "\"\xFF\"",
                                "{\"text\": \"\xC3(\"}", "{\"text\": \"\\ud800\"}", "nonsense"}) {
    EXPECT_THAT(error(bad), HasSubstr("a.jsonl line 2 is not valid JSON")) << bad;
    EXPECT_EQ(error(bad).find('\n'), std::string::npos);
  }
  EXPECT_THAT(error("[1, 2]"), HasSubstr("line 2 is not a JSON object"));
  EXPECT_THAT(error("{\"txt\": \"a\"}"), HasSubstr("line 2 has no member \"text\""));
  EXPECT_THAT(error("{\"text\": 3}"), HasSubstr("line 2: its member \"text\" is not a string"));
}

Corpus corpus_of(const ScratchFolder& folder, const std::string& below, int files, size_t bytes) {
  for (int i = 0; i < files; ++i) {
    write_file(folder / (below + "/file" + std::to_string(i) + ".txt"),
               std::string(bytes - 1, 'x') + "\n");
  }
  return find_text({folder / below});
}

TEST(SplitCorpus, HoldsBackWholeFilesWhereverTheFolderLies) {
  const ScratchFolder folder;
  const CorpusSplit here = split_corpus(corpus_of(folder, "a", 100, 50), 0.1);
  const CorpusSplit there = split_corpus(corpus_of(folder, "b/c", 100, 50), 0.1);
  EXPECT_EQ(here.validation.sources.size(), 10u);
  EXPECT_EQ(here.train.sources.size(), 90u);
  EXPECT_EQ(names(here.validation), names(there.validation));
  std::vector<std::string> all = names(here.train), held = names(here.validation);
  all.insert(all.end(), held.begin(), held.end());
  std::ranges::sort(all);
  EXPECT_EQ(std::ranges::unique(all).size(), 0u);
  EXPECT_EQ(all.size(), 100u);
}

TEST(SplitCorpus, OneMoreFileMovesFewOthers) {
  const ScratchFolder folder;
  const auto before = names(split_corpus(corpus_of(folder, "a", 100, 50), 0.1).validation);
  const auto after = names(split_corpus(corpus_of(folder, "a", 101, 50), 0.1).validation);
  std::vector<std::string> common;
  std::ranges::set_intersection(before, after, std::back_inserter(common));
  EXPECT_GE(common.size(), 9u);
}

TEST(SplitCorpus, OfASingleFileTheEndIsHeldBackFromALineOn) {
  const ScratchFolder folder;
  std::string text;
  for (int i = 0; i < 100; ++i) text += "line " + std::to_string(i) + "\n";
  write_file(folder / "one.txt", text);
  const CorpusSplit split = split_corpus(find_text({folder / "one.txt"}), 0.1);
  const std::string train = documents(split.train).at(0), held = documents(split.validation).at(0);
  EXPECT_EQ(train + held, text);
  EXPECT_TRUE(held.starts_with("line "));
  EXPECT_NEAR(static_cast<double>(held.size()), 0.1 * static_cast<double>(text.size()), 10);
}

TEST(SplitCorpus, OfJsonLinesWholeLinesAreHeldBack) {
  const ScratchFolder folder;
  std::string lines;
  for (int i = 0; i < 50; ++i) lines += "{\"text\": \"document " + std::to_string(i) + "\"}\n";
  write_file(folder / "one.jsonl", lines);
  const CorpusSplit split = split_corpus(find_text({folder / "one.jsonl"}), 0.2);
  EXPECT_EQ(documents(split.train).size() + documents(split.validation).size(), 50u);
  EXPECT_EQ(documents(split.validation).back(), "document 49");
}

TEST(SplitCorpus, OfAFewLargeFilesTheEndOfTheLargestIsHeldBack) {
  const ScratchFolder folder;
  for (int i = 0; i < 3; ++i) {
    std::string text;
    for (int line = 0; line < 100 + i; ++line) text += "some line\n";
    write_file(folder / ("t/" + std::to_string(i)), text);
  }
  const CorpusSplit split = split_corpus(find_text({folder / "t"}), 0.05);
  EXPECT_THAT(names(split.validation), ElementsAre("2"));
  EXPECT_EQ(split.train.sources.size(), 3u);
  EXPECT_NEAR(static_cast<double>(split.validation.bytes()), 0.05 * 3030, 10);
}

TEST(SplitCorpus, TextThatCannotBeSplitIsRefused) {
  const ScratchFolder folder;
  write_file(folder / "one.txt", "a single line without an end");
  const Corpus corpus = find_text({folder / "one.txt"});
  EXPECT_THAT(error_of([&] { split_corpus(corpus, 0.1); }),
              HasSubstr("give validation text of its own"));
  for (const double share : {0.0, 0.6, -1.0})
    EXPECT_NE(error_of([&] { split_corpus(corpus, share); }), "");
}

}  // namespace
}  // namespace natslm::data
