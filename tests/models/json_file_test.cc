// What a hostile config.json must not do to the program that opens it.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/json_file.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"

namespace natslm::models {
namespace {

using test::error_of;

std::string refusal(const std::string& text) {
  return error_of([&] { parse_small_json(text); });
}

std::string lists(int levels) {
  return std::string(levels, '[') + std::string(levels, ']');
}

std::string fields(int count) {
  std::string text = "{";
  for (int i = 0; i < count; ++i)
    text += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":" + std::to_string(i);
  return text + "}";
}

TEST(SmallJson, KeepsFieldsInTheirOrder) {
  EXPECT_EQ(parse_small_json(R"({"b": [1, {"a": 2}], "a": {"a": null}})").dump(),
            R"({"b":[1,{"a":2}],"a":{"a":null}})");
}

TEST(SmallJson, RefusesWhatIsNoJson) {
  for (const char* text : {"", "{", "{\"a\": 1} 2", "{\"a\": 1e999}", "\"\xff\"", "{'a': 1}"})
    EXPECT_EQ(refusal(text), "not valid JSON; the file is damaged") << text;
}

// Printing a value takes stack for each level.
TEST(SmallJson, RefusesLevelsThatWouldOverflowTheStack) {
  EXPECT_EQ(refusal(lists(100)), "");
  EXPECT_EQ(refusal(lists(101)), "nests more than 100 levels deep");
  EXPECT_EQ(refusal("{\"a\": " + lists(1'000'000) + "}"), "nests more than 100 levels deep");
}

TEST(SmallJson, RefusesFieldsThatWouldTakeMinutes) {
  EXPECT_EQ(parse_small_json(fields(4'000)).size(), 4'000);
  EXPECT_EQ(refusal(fields(100'000)), "has more than 4000 fields");
  // In all objects together.
  EXPECT_EQ(refusal("[" + fields(2'000) + "," + fields(2'001) + "]"), "has more than 4000 fields");
}

TEST(SmallJson, RefusesAFieldThatIsGivenTwice) {
  EXPECT_EQ(refusal(R"({"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]})"), "");
  EXPECT_EQ(refusal(R"({"a\n": 1, "b": 2, "a\n": 1})"), "the field 'a\\x0a' is given twice");
}

TEST(SmallJson, NamesTheFile) {
  const test::ScratchFolder folder;
  const auto file = folder / "config.json";
  const auto refusal_of_file = [&] { return error_of([&] { read_json_file(file); }); };
  EXPECT_NE(refusal_of_file().find(file.string()), std::string::npos);
  std::ofstream(file) << "{";
  EXPECT_EQ(refusal_of_file(), file.string() + ": not valid JSON; the file is damaged");
  std::filesystem::resize_file(file, 10'000'001);
  EXPECT_EQ(refusal_of_file(), file.string() + ": has 10000001 bytes, expected at most 10000000");
}

}  // namespace
}  // namespace natslm::models
