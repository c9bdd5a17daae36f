// What Python's strings do. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "natslm/data/jinja/renderer.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data::jinja {

std::string upper(std::string_view text);
std::string lower(std::string_view text);
std::string capitalized(std::string_view text);
// str.title(): each letter that follows no letter.
std::string titled(std::string_view text);
// The filter title: each word, where white space and opening brackets end words.
std::string title_words(std::string_view text);
// set: the characters to strip; nullptr: white space.
std::string stripped(std::string_view text, const std::string* set, bool left, bool right);
// count: of replacements; -1: all.
std::string replaced(Renderer& renderer, const std::string& text, const std::string& from,
                     const std::string& to, int64_t count);
// separator: nullptr or None: runs of white space. most: splits; -1: all.
List split(const std::string& text, const Value* separator, int64_t most, bool from_right);
List lines_of(const std::string& text, bool keep_ends);
std::string escaped(std::string_view text);  // for HTML
// Every line but the first, and empty ones, begins with `by`; or these too.
std::string indented(const std::string& text, const std::string& by, bool first, bool blank);

}  // namespace natslm::data::jinja
