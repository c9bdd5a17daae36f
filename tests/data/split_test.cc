// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "natslm/data/split_rule.h"
#include "natslm/data/unicode_classes.h"
#include "tests/data/both_splitters.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using Pieces = std::vector<std::string>;

Pieces cut(std::string_view text, const std::vector<size_t>& ends) {
  Pieces pieces;
  size_t begin = 0;
  for (const size_t end : ends) {
    pieces.emplace_back(text.substr(begin, end - begin));
    begin = end;
  }
  return pieces;
}

TEST(Split, CutsAsGpt2Does) {
  EXPECT_EQ(cut("Hello world, it's   a test!", by_hand("Hello world, it's   a test!", false)),
            (Pieces{"Hello", " world", ",", " it", "'s", "  ", " a", " test", "!"}));
  EXPECT_EQ(cut("x \n\n y", by_hand("x \n\n y", false)), (Pieces{"x", " \n\n", " y"}));
  EXPECT_EQ(cut("x \ty", by_hand("x \ty", false)), (Pieces{"x", " ", "\t", "y"}));
  EXPECT_EQ(cut("end  ", by_hand("end  ", false)), (Pieces{"end", "  "}));
  EXPECT_EQ(cut("a1b 23", by_hand("a1b 23", false)), (Pieces{"a", "1", "b", " 23"}));
}

TEST(Split, WithDigitsEachDigitStandsAlone) {
  EXPECT_EQ(cut("a 23  4x", by_hand("a 23  4x", true)),
            (Pieces{"a", " ", "2", "3", "  ", "4", "x"}));
}

TEST(Split, BytesThatAreNotUtf8ArePiecesAndEndTheTextOnEitherSide) {
  EXPECT_EQ(cut("ab\xFF\xFE  \xC3 c", by_hand("ab\xFF\xFE  \xC3 c", false)),
            (Pieces{"ab", "\xFF\xFE", "  ", "\xC3", " c"}));
}

TEST(Split, ByHandEqualsPcre2WhereverTheClassOfCodePointsChanges) {
  std::string text;
  for (const ClassRange& range : class_ranges()) {
    for (const uint32_t c : {range.first - 1, range.first, range.last, range.last + 1}) {
      if (c >= 0xD800 && c < 0xE000) continue;
      const std::string x = utf8(c);
      text += "a" + x + "1" + x + " " + x + "'s" + x + x + "  " + x + "\n";
    }
  }
  for (const bool digits : {false, true})
    EXPECT_EQ(by_hand(text, digits), by_pattern(text, digits));
}

TEST(Split, ByHandEqualsPcre2ForAllShortTextsOverOneCharacterOfEachKind) {
  // Every branch of the pattern depends on kinds and on the letters of contractions.
  const Pieces letters{"s",  "e", "l", "r",        "v",    "'",       " ",
                       "\n", "1", "!", "\xC2\xA0", "\xFF", "\xCC\x81"};
  for (const bool digits : {false, true}) {
    for (int length = 1; length <= 4; ++length) {
      std::vector<size_t> at(length, 0);
      for (bool more = true; more;) {
        std::string text;
        for (const size_t i : at) text += letters[i];
        ASSERT_EQ(by_hand(text, digits), by_pattern(text, digits)) << testing::PrintToString(text);
        size_t place = 0;
        while (place < at.size() && ++at[place] == letters.size()) at[place++] = 0;
        more = place < at.size();
      }
    }
  }
}

TEST(Split, ByHandEqualsPcre2ForRandomTextsAndDamagedOnes) {
  for (uint64_t number = 0; number < 500; ++number) {
    for (const std::string& text : {fuzz_text(number), damaged_text(number)}) {
      for (const bool digits : {false, true}) {
        ASSERT_EQ(by_hand(text, digits), by_pattern(text, digits)) << "number " << number << digits;
      }
    }
  }
}

TEST(Split, PortionsOfAnySizeGiveTheSamePieces) {
  const std::string text = damaged_text(7);
  for (const size_t room : {1, 2, 3, 255})
    EXPECT_EQ(by_hand(text, true, room), by_hand(text, true));
}

TEST(Split, AStablePrefixIsSplitTheSameWhateverFollows) {
  const Gpt2Splitter splitter(false);
  for (uint64_t number = 0; number < 300; ++number) {
    const std::string text = number % 2 ? fuzz_text(number) : damaged_text(number);
    const std::vector<size_t> whole = by_hand(text, false);
    Random random(number);
    for (int cuts = 0; cuts < 40; ++cuts) {
      const std::string_view seen = std::string_view(text).substr(0, random.below(text.size() + 1));
      const size_t stable = splitter.stable_prefix(seen, seen.size());
      if (stable == 0) continue;
      std::vector<size_t> joined = by_hand(seen.substr(0, stable), false);
      for (const size_t end : by_hand(text.substr(stable), false)) joined.push_back(stable + end);
      ASSERT_EQ(joined, whole) << "number " << number << ", seen " << seen.size();
    }
  }
}

TEST(Split, AStablePrefixIsNeverFarFromTheEndOfOrdinaryText) {
  const Gpt2Splitter splitter(false);
  const std::string text = "Most keys are not needed for long, they're read by the next words.";
  for (size_t size = 12; size <= text.size(); ++size) {
    EXPECT_LT(size - splitter.stable_prefix(std::string_view(text).substr(0, size), size), 10);
  }
}

TEST(Split, OtherPatternsUseTheirOwnAlternatives) {
  // Up to three digits, letters with one character before them: as later vocabularies split.
  const PatternSplitter splitter(
      {false,
       R"([^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"});
  const std::string text = "it's 12345 keys;\n\n(done)";
  std::vector<size_t> ends;
  splitter.split(text, ends);
  EXPECT_EQ(cut(text, ends),
            (Pieces{"it", "'s", " ", "123", "45", " keys", ";\n\n", "(done", ")"}));
}

TEST(Split, AnImpossiblePatternIsRefusedWithPcre2sReason) {
  EXPECT_NE(error_of([] {
              PatternSplitter({false, "(unclosed"});
            }).find("refused by PCRE2"),
            std::string::npos);
}

TEST(UnicodeClasses, OverlongFormsSurrogatesAndTooLargeValuesAreInvalid) {
  for (const std::string_view bad :
       {"\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xED\xBF\xBF",
        "\xF0\x80\x80\x80", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\x80",
        "\xFF", "\xC3", "\xE2\x82", "\xF0\x9F\x98", "\xE2\x28\xA1"}) {
    EXPECT_EQ(char_at(bad, 0).kind, CharClass::kInvalid) << testing::PrintToString(bad);
    EXPECT_EQ(char_at(bad, 0).bytes, 1u);
  }
}

TEST(UnicodeClasses, EachCodePointIsReadBackFromBothSides) {
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string text = utf8(c);
    ASSERT_EQ(char_at(text, 0).bytes, text.size()) << c;
    ASSERT_EQ(char_at(text, 0).kind, class_of(c)) << c;
    ASSERT_EQ(char_before("\xE2" + text, text.size() + 1).bytes, text.size()) << c;
  }
}

}  // namespace
}  // namespace natslm::data
