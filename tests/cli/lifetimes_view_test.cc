// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/lifetimes_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <sstream>

#include "natslm/base/error.h"
#include "natslm/cli/utf8.h"

namespace natslm::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// Two layers of one head; tokens "one", " two", " three".
LifetimesPicture three_words() {
  LifetimesPicture picture;
  picture.tokens = {"one", " two", " three"};
  picture.heads = {{{.role = {0, 1, 2}, .alive = {1, 0, 1}}},
                   {{.role = {0, 2, 2}, .alive = {1, 0, 0}}}};
  return picture;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// What is left when escape sequences are taken out.
std::string without_colour(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\x1b') {
      while (text[i] != 'm') ++i;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

int32_t width_of(const std::string& line) {
  int32_t columns = 0;
  for (size_t at = 0; at < line.size();) {
    const Character character = character_at(line, at);
    columns += columns_of(character.value);
    at += character.bytes;
  }
  return columns;
}

TEST(LifetimesView, MarksStandUnderTheTokensFirstCharacters) {
  const std::string text = draw_lifetimes(three_words(), {.layer = 0, .head = 0});
  EXPECT_THAT(text, HasSubstr("  one two three\n  G  l   S\n"));
  EXPECT_THAT(text,
              HasSubstr("G/g Global   L/l Local   S/s Sliding window   capital: alive at the end"));
  EXPECT_THAT(text, HasSubstr("layer 0, KV head 0"));
}

TEST(LifetimesView, WithoutColourThereIsNoEscapeSequence) {
  EXPECT_THAT(draw_lifetimes(three_words(), {}), Not(HasSubstr("\x1b")));
}

TEST(LifetimesView, EachRoleAndEachFateHasItsOwnColour) {
  for (const Palette palette : {Palette::k16, Palette::k256}) {
    LifetimesPicture picture;
    picture.tokens = {"a", "b", "c", "d", "e", "f"};
    picture.heads = {{{.role = {0, 0, 1, 1, 2, 2}, .alive = {1, 0, 1, 0, 1, 0}}}};
    const std::string text = draw_lifetimes(picture, {.palette = palette, .layer = 0, .head = 0});
    std::set<std::string> codes;
    for (const char* letter : {"a", "b", "c", "d", "e", "f"}) {
      const size_t at = text.find(std::string("m") + letter + "\x1b[0m");
      ASSERT_NE(at, std::string::npos) << letter;
      codes.insert(text.substr(text.rfind('\x1b', at), at - text.rfind('\x1b', at)));
    }
    EXPECT_EQ(codes.size(), 6u);
  }
}

TEST(LifetimesView, OverAllHeadsTheRoleInMostHeadsThatHoldTheTokenIsShown) {
  LifetimesPicture picture;
  picture.tokens = {"x", "y"};
  // Token y: Sliding in two heads that lost it, Local in the one that holds it.
  picture.heads = {{{.role = {0, 2}, .alive = {1, 0}},
                    {.role = {0, 2}, .alive = {1, 0}},
                    {.role = {0, 1}, .alive = {1, 1}}}};
  EXPECT_THAT(draw_lifetimes(picture, {}), HasSubstr("  xy\n  GL\n"));
  picture.heads[0][2].alive[1] = 0;
  EXPECT_THAT(draw_lifetimes(picture, {}), HasSubstr("  xy\n  Gs\n"));
}

TEST(LifetimesView, APolicyWithoutRolesShowsLifeAndDeathOnly) {
  LifetimesPicture picture;
  picture.tokens = {"ab", "cd"};
  picture.heads = {{{.role = {}, .alive = {0, 1}}}};
  const std::string text = draw_lifetimes(picture, {});
  EXPECT_THAT(text, HasSubstr("  abcd\n  . #\n"));
  EXPECT_THAT(text, Not(HasSubstr("Global")));
}

TEST(LifetimesView, LinesStayInsideTheTerminalAndKeepEveryCharacter) {
  LifetimesPicture picture;
  HeadLifetimes head;
  std::string all;
  for (int i = 0; i < 400; ++i) {
    const char* kPieces[] = {
        " word", "\xE6\xBC\xA2", "\t", "\xF0\x9F\x98\x80", " longer_identifier", "e\xCC\x81"};
    picture.tokens.emplace_back(kPieces[i % 6]);
    all += picture.tokens.back() == "\t" ? "    " : picture.tokens.back();
    head.role.push_back(static_cast<int8_t>(i % 3));
    head.alive.push_back(i % 4 == 0);
  }
  picture.heads.assign(12, std::vector<HeadLifetimes>(3, head));
  for (const Palette palette : {Palette::kPlain, Palette::k256}) {
    for (const int32_t width : {80, 100, 120}) {
      const std::string text = without_colour(
          draw_lifetimes(picture, {.palette = palette, .width = width, .max_lines = 1000}));
      std::string shown;
      for (const std::string& line : lines_of(text)) EXPECT_LE(width_of(line), width) << line;
      if (palette == Palette::kPlain) continue;
      const auto lines = lines_of(text);
      size_t begin = 0;
      while (!lines[begin].empty()) ++begin;
      for (size_t i = begin + 1; !lines[i].empty(); ++i) shown += lines[i].substr(2);
      EXPECT_EQ(shown, all);
    }
  }
}

TEST(LifetimesView, ManyHeadsBecomeNumbers) {
  LifetimesPicture picture = three_words();
  for (auto& layer : picture.heads) layer.resize(12, layer[0]);
  const std::string text = draw_lifetimes(picture, {});
  EXPECT_THAT(text, HasSubstr("one number a KV head"));
  for (const std::string& line : lines_of(text)) EXPECT_LE(width_of(line), 80) << line;
}

TEST(LifetimesView, TheMiddleOfALongTextIsLeftOutAndSaidSo) {
  LifetimesPicture picture;
  HeadLifetimes head;
  for (int i = 0; i < 100; ++i) {
    picture.tokens.push_back("line " + std::to_string(i) + "\n");
    head.role.push_back(2);
    head.alive.push_back(0);
  }
  picture.heads = {{head}};
  const std::string text = draw_lifetimes(picture, {.max_lines = 12});
  EXPECT_THAT(text, HasSubstr("88 lines left out"));
  EXPECT_THAT(text, HasSubstr("line 3\xE2"));
  EXPECT_THAT(text, Not(HasSubstr("line 4\xE2")));
  EXPECT_THAT(text, HasSubstr("line 92\xE2"));
}

TEST(LifetimesView, ControlCharactersNeverReachTheTerminal) {
  LifetimesPicture picture;
  picture.tokens = {"a\x1b[2J", "\xFF", "\x07"};
  picture.heads = {{{.role = {0, 0, 0}, .alive = {1, 1, 1}}}};
  const std::string text = draw_lifetimes(picture, {});
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  EXPECT_THAT(text, Not(HasSubstr("\x07")));
  EXPECT_THAT(text, HasSubstr("a\xEF\xBF\xBD[2J\xEF\xBF\xBD"));
  EXPECT_EQ(printable("a\tb\nc\xC2\x9B"
                      "d"),
            "a\tb\nc\xEF\xBF\xBD"
            "d");
}

TEST(LifetimesView, ALayerOrHeadThatIsNotThereIsAnError) {
  EXPECT_THROW(draw_lifetimes(three_words(), {.layer = 2}), Error);
  EXPECT_THROW(draw_lifetimes(three_words(), {.head = 1}), Error);
  EXPECT_THROW(draw_lifetimes({}, {}), Error);
}

TEST(LifetimesView, BarsShowTheShareAlive) {
  const std::string text = draw_lifetimes(three_words(), {});
  EXPECT_THAT(text, HasSubstr("66.7 %"));
  EXPECT_THAT(text, HasSubstr("33.3 %"));
  EXPECT_THAT(text, HasSubstr("50.0 % of 3 tokens"));
}

TEST(Utf8, CharactersAreReadOneByOneAndBadBytesAreTold) {
  EXPECT_EQ(character_at("a", 0).value, U'a');
  EXPECT_EQ(character_at("\xE2\x82\xAC", 0).value, U'\u20AC');
  EXPECT_EQ(character_at("\xF0\x9F\x98\x80", 0).bytes, 4u);
  for (const char* bad :
       {"\x80", "\xC0\x80", "\xE2\x82", "\xED\xA0\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    EXPECT_EQ(character_at(bad, 0).value, kReplacement);
    EXPECT_EQ(character_at(bad, 0).bytes, 1u);
  }
}

}  // namespace
}  // namespace natslm::cli
