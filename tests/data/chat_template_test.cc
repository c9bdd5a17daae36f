// Chat templates against what `transformers`' environment renders, recorded by
// tools/golden_chat_templates.py. SPDX-License-Identifier: Apache-2.0
#include "natslm/data/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <ctime>
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/atomic_file.h"
#include "tests/data/tokenizer_texts.h"

namespace natslm::data {
namespace {

using Json = nlohmann::ordered_json;
using testing::HasSubstr;

Json golden() {
  return Json::parse(read_file(golden_folder().parent_path() / "chat_templates.json"));
}

std::string template_of(const Json& all, const Json& one) {
  return all["templates"][one["template"].get<size_t>()];
}
std::string variables_of(const Json& all, const Json& one) {
  return all["variables"][one["variables"].get<size_t>()].dump();
}

TEST(ChatTemplate, RendersAsTransformersDoes) {
  ::setenv("TZ", "UTC", 1);
  ::tzset();
  const Json all = golden();
  ASSERT_GT(all["cases"].size(), 150u);
  for (const Json& one : all["cases"]) {
    const std::string name = one["name"];
    std::string text;
    const std::string error = error_of([&] {
      const ChatTemplate parsed(template_of(all, one), "<s>", "</s>");
      text = parsed.render_json(variables_of(all, one), all["now"].get<std::time_t>());
    });
    if (one.contains("error")) {
      EXPECT_NE(error, "") << name;
    } else {
      EXPECT_EQ(error, "") << name;
      EXPECT_EQ(text, one["text"].get<std::string>()) << name;
    }
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
}

constexpr const char* kSimple =
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}";

TEST(ChatTemplate, TakesAConversation) {
  const ChatTemplate parsed(kSimple, "", "</s>");
  const ChatMessage messages[] = {{"user", "a \"b\" \xFF"}, {"assistant", "c"}};
  EXPECT_EQ(parsed.render(messages), "<user>a \"b\" \xEF\xBF\xBD</s><assistant>c</s><assistant>");
  EXPECT_EQ(parsed.render({}, false), "");
}

TEST(ChatTemplate, WhatATemplateRefusesIsItsOwnMessage) {
  const ChatTemplate parsed("{{ raise_exception('roles must alternate') }}");
  EXPECT_EQ(error_of([&] { parsed.render({}); }),
            "the chat template refuses this conversation: roles must alternate");
}

TEST(ChatTemplate, UnsupportedConstructsAreNamedWithTheirLine) {
  const auto refused = [](const char* source) { return error_of([&] { ChatTemplate{source}; }); };
  EXPECT_EQ(refused("a\n{% include 'x' %}"),
            "chat template: line 2: the statement \"include\" is not supported");
  EXPECT_EQ(refused("{{ x | urlize }}"),
            "chat template: line 1: the filter \"urlize\" is not supported");
  EXPECT_EQ(refused("{{ x is odder }}"),
            "chat template: line 1: the test \"odder\" is not supported");
  EXPECT_THAT(refused("{% for x in y recursive %}{% endfor %}"), HasSubstr("recursive"));
  const ChatTemplate late("\n\n{{ m.a.b }}");
  EXPECT_EQ(error_of([&] { late.render_json(R"({"m": {}})"); }),
            "chat template: line 3: \"a\" is undefined");
}

TEST(ChatTemplate, HostileTemplatesEndInAnError) {
  const auto hostile = [](const std::string& source) {
    return error_of([&] { ChatTemplate(source).render({}); });
  };
  EXPECT_NE(hostile("{{ 'a' * 99999999999 }}"), "");
  EXPECT_NE(
      hostile("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
      "");
  EXPECT_NE(hostile("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "");
  EXPECT_NE(hostile("{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(99) %}"
                    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}"),
            "");
  EXPECT_NE(hostile("{% set ns = namespace(a=[]) %}{% for i in range(9999) %}"
                    "{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}"),
            "");
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "(";
  EXPECT_NE(hostile("{{ " + deep + " }}"), "");
  std::string minus, chain;
  for (int i = 0; i < 100000; ++i) minus += "- ", chain += "1 + ";
  EXPECT_NE(hostile("{{ " + minus + "1 }}"), "");
  EXPECT_NE(hostile("{{ " + chain + "1 }}"), "");
  EXPECT_NE(error_of([] { ChatTemplate("x").render_json(std::string(100000, '[')); }), "");
}

TEST(ChatTemplate, ADamagedTemplateNeverCrashes) {
  const Json all = golden();
  for (const Json& one : all["cases"]) {
    const std::string source = template_of(all, one), variables = variables_of(all, one);
    if (source.size() > 600) continue;
    for (size_t at = 0; at < source.size(); at += 3) {
      std::string damaged = source;
      damaged[at] = "{}%#'\"|.([-~"[at % 12];
      error_of([&] { ChatTemplate(damaged).render_json(variables); });
      error_of([&] { ChatTemplate(source.substr(0, at)).render_json(variables); });
    }
  }
}

TEST(ChatTemplate, IsFoundBesideTheTokenizer) {
  const ScratchFolder folder;
  EXPECT_FALSE(load_chat_template(folder.path()));
  write_file(
      folder / "tokenizer_config.json",
      R"({"chat_template": "a{{ bos_token }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}})");
  EXPECT_EQ(load_chat_template(folder.path())->render({}), "a<s>");
  EXPECT_EQ(load_chat_template(folder.path())->eos_token(), "</s>");
  EXPECT_FALSE(load_chat_template(folder.path(), "tool_use"));
  write_file(
      folder / "tokenizer_config.json",
      R"({"chat_template": [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "t"}]})");
  EXPECT_EQ(load_chat_template(folder.path())->render({}), "b");
  EXPECT_EQ(load_chat_template(folder.path(), "tool_use")->render({}), "t");
  write_file(folder / "chat_template.jinja", "c\n");
  EXPECT_EQ(load_chat_template(folder.path())->render({}), "c");
  write_file(folder / "chat_template.jinja", "{{");
  EXPECT_THAT(error_of([&] { load_chat_template(folder.path()); }),
              HasSubstr(folder.path().string()));
}

}  // namespace
}  // namespace natslm::data
