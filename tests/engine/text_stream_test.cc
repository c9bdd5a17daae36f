// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/text_stream.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace natslm::engine {
namespace {

const std::string kText = "na\xC3\xAFve \xE2\x82\xAC 5 \xF0\x9F\x98\x80!";  // naïve € 5 😀!

// Whether no character is cut at the end: by a plain count of continuation bytes.
bool ends_whole(const std::string& text) {
  size_t lead = text.size();
  while (lead > 0 && (static_cast<uint8_t>(text[lead - 1]) & 0xC0) == 0x80) --lead;
  if (lead == 0) return true;
  const uint8_t byte = text[lead - 1];
  const size_t have = text.size() - lead;
  return have == (byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : byte >= 0xC0 ? 1 : 0);
}

TEST(TextStream, PiecesAreWholeCharactersWhereverTheTokensCut) {
  for (size_t step = 1; step <= 5; ++step) {
    TextStream stream;
    std::string shown;
    for (size_t i = 0; i < kText.size(); i += step) {
      shown += stream.push(kText.substr(i, step));
      EXPECT_TRUE(ends_whole(shown)) << "after byte " << i << ", " << step << " bytes a token";
    }
    EXPECT_EQ(shown + stream.finish(), kText);
  }
}

TEST(TextStream, ACharacterComesOutWithItsLastByte) {
  TextStream stream;
  EXPECT_EQ(stream.push("\xF0"), "");
  EXPECT_EQ(stream.push("\x9F\x98"), "");
  EXPECT_EQ(stream.push("\x80"), "\xF0\x9F\x98\x80");
}

TEST(TextStream, BytesThatAreNoUtf8ComeOutUnchangedAndWithoutDelay) {
  for (const std::string bad :
       {"\xFF", "\x80", "\xC0\x80", "\xED\xA0", "\xF5\x80", "\xE2\x28", "\xF0\x80"}) {
    TextStream stream;
    EXPECT_EQ(stream.push(bad), bad) << "bytes of size " << bad.size();
  }
}

TEST(TextStream, ACutCharacterAtTheEndIsNotLost) {
  TextStream stream;
  EXPECT_EQ(stream.push("a\xE2\x82"), "a");
  EXPECT_EQ(stream.finish(), "\xE2\x82");
}

TEST(TextStream, AnyBytesComeOutExactlyAsTheyWentIn) {
  std::mt19937 random(7);
  for (int round = 0; round < 500; ++round) {
    std::string bytes, shown;
    for (int i = 0; i < 40; ++i) bytes.push_back(static_cast<char>(0x78 + random() % 0x88));
    TextStream stream({"never there"});
    for (size_t i = 0; i < bytes.size();) {
      const size_t size = 1 + random() % 4;
      shown += stream.push(bytes.substr(i, size));
      i += size;
    }
    EXPECT_EQ(shown + stream.finish(), bytes) << "round " << round;
  }
}

TEST(TextStream, StopsBeforeAStopStringEvenIfTokensCutIt) {
  for (size_t step = 1; step <= 7; ++step) {
    const std::string text = "one two STOP three";
    TextStream stream({"STOP"});
    std::string shown;
    for (size_t i = 0; i < text.size() && !stream.stopped(); i += step) {
      shown += stream.push(text.substr(i, step));
    }
    EXPECT_TRUE(stream.stopped());
    EXPECT_EQ(shown + stream.finish(), "one two ");
    EXPECT_EQ(stream.push("more"), "");
  }
}

TEST(TextStream, WhatOnlyLooksLikeAStopStringIsShownAfterAll) {
  TextStream stream({"STOP"});
  EXPECT_EQ(stream.push("a ST"), "a ");
  EXPECT_EQ(stream.push("ST"), "ST");  // the first "ST" cannot go on any more, the second can
  EXPECT_EQ(stream.push("A"), "STA");
}

TEST(TextStream, TheFirstOfSeveralStopStringsWins) {
  TextStream stream({"later", "soon"});
  EXPECT_EQ(stream.push("as soon as later"), "as ");
  EXPECT_TRUE(stream.stopped());
}

TEST(TextStream, AnEmptyStopStringStopsNothing) {
  TextStream stream({""});
  EXPECT_EQ(stream.push("text"), "text");
  EXPECT_FALSE(stream.stopped());
}

}  // namespace
}  // namespace natslm::engine
