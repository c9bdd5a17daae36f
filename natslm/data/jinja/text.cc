// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/text.h"

#include <utf8proc.h>

#include <algorithm>

#include "natslm/base/error.h"

namespace natslm::data::jinja {
namespace {

void append_upper(uint32_t c, std::string& text) {
  if (c == 0xDF) {
    text += "SS";
  } else {
    append_utf8(static_cast<uint32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))), text);
  }
}

template <class Append>
std::string each_character(std::string_view text, Append&& append) {
  std::string result;
  for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
    if (c.value == kNoCharacter) {
      result += bytes;
    } else {
      append(c.value, result);
    }
  });
  return result;
}

bool in_set(const CodePoint& c, std::string_view bytes, const std::string* set) {
  if (!set) return c.kind == CharClass::kSpace || (c.value >= 0x1C && c.value <= 0x1F);
  for (size_t at = 0; at < set->size();) {
    const size_t size = char_at(*set, at).bytes;
    if (std::string_view(*set).substr(at, size) == bytes) return true;
    at += size;
  }
  return false;
}

}  // namespace

std::string upper(std::string_view text) {
  return each_character(text, append_upper);
}
std::string lower(std::string_view text) {
  return each_character(text, append_lower);
}
std::string capitalized(std::string_view text) {
  if (text.empty()) return "";
  const size_t first = char_at(text, 0).bytes;
  return upper(text.substr(0, first)) + lower(text.substr(first));
}

std::string titled(std::string_view text) {
  bool inside = false;
  return each_character(text, [&](uint32_t c, std::string& result) {
    inside ? append_lower(c, result) : append_upper(c, result);
    inside = class_of(c) == CharClass::kLetter;
  });
}

std::string title_words(std::string_view text) {
  bool begins = true;
  return each_character(text, [&](uint32_t c, std::string& result) {
    begins ? append_upper(c, result) : append_lower(c, result);
    begins = c == '-' || c == '(' || c == '{' || c == '[' || c == '<' ||
             class_of(c) == CharClass::kSpace;
  });
}

std::string stripped(std::string_view text, const std::string* set, bool left, bool right) {
  const std::vector<size_t> offsets = character_offsets(text);
  size_t first = 0, last = offsets.size() - 1;
  const auto strips = [&](size_t i) {
    return in_set(code_point_at(text, offsets[i]),
                  text.substr(offsets[i], offsets[i + 1] - offsets[i]), set);
  };
  while (left && first < last && strips(first)) ++first;
  while (right && last > first && strips(last - 1)) --last;
  return std::string(text.substr(offsets[first], offsets[last] - offsets[first]));
}

std::string replaced(Renderer& renderer, const std::string& text, const std::string& from,
                     const std::string& to, int64_t count) {
  std::string result;
  size_t done = 0;
  if (from.empty()) {  // Python puts `to` around every character
    for (const size_t at : character_offsets(text)) {
      result.append(text, done, at - done);
      done = at;
      if (count-- == 0) break;
      result += to;
      renderer.charge(to.size() + 1);
    }
    return result.append(text, done);
  }
  for (size_t at; count != 0 && (at = text.find(from, done)) != std::string::npos; --count) {
    result.append(text, done, at - done) += to;
    done = at + from.size();
    renderer.charge(to.size() + from.size());
  }
  renderer.charge(text.size());
  return result.append(text, done);
}

namespace {

List words_of(std::string_view text, int64_t most, bool from_right) {
  List words;
  std::vector<std::pair<size_t, size_t>> found;
  size_t begin = std::string_view::npos, at = 0;
  for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
    const bool space = in_set(c, bytes, nullptr);
    if (space && begin != text.npos) found.emplace_back(begin, at), begin = text.npos;
    if (!space && begin == text.npos) begin = at;
    at += bytes.size();
  });
  if (begin != text.npos) found.emplace_back(begin, text.size());
  const auto count = static_cast<int64_t>(found.size());
  if (most >= 0 && count > most + 1) {
    if (from_right) {
      found[count - 1 - most].first = found[0].first;
      found.erase(found.begin(), found.end() - most - 1);
    } else {
      found[most].second = text.size();
      found.resize(most + 1);
    }
  }
  for (const auto& [first, last] : found)
    words.items.emplace_back(text.substr(first, last - first));
  if (most == 0 && !words.items.empty()) {  // the rest keeps the white space at its far end
    words.items[0] = stripped(text, nullptr, !from_right, from_right);
  } else if (most > 0 && count > most + 1 && from_right) {
    words.items[0] =
        stripped(std::string_view(text).substr(0, found[0].second), nullptr, false, true);
  }
  return words;
}

}  // namespace

List split(const std::string& text, const Value* separator, int64_t most, bool from_right) {
  if (!separator || separator->is_none()) return words_of(text, most, from_right);
  const std::string& at = separator->need_string("split");
  NATSLM_CHECK(!at.empty(), "split: the separator is empty");
  List parts;
  size_t begin = 0, end = text.size();
  if (from_right) {
    for (size_t found; most != 0 && end >= at.size() &&
                       (found = text.rfind(at, end - at.size())) != std::string::npos;
         --most) {
      parts.items.emplace_back(text.substr(found + at.size(), end - found - at.size()));
      end = found;
    }
    parts.items.emplace_back(text.substr(0, end));
    std::ranges::reverse(parts.items);
    return parts;
  }
  for (size_t found; most != 0 && (found = text.find(at, begin)) != std::string::npos; --most) {
    parts.items.emplace_back(text.substr(begin, found - begin));
    begin = found + at.size();
  }
  parts.items.emplace_back(text.substr(begin));
  return parts;
}

List lines_of(const std::string& text, bool keep_ends) {
  List lines;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = std::min(text.find_first_of("\n\r\v\f", begin), text.size());
    size_t next = std::min(end + 1, text.size());
    if (end + 1 < text.size() && text[end] == '\r' && text[end + 1] == '\n') ++next;
    lines.items.emplace_back(text.substr(begin, (keep_ends ? next : end) - begin));
    begin = next;
  }
  return lines;
}

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '\'':
        result += "&#39;";
        break;
      case '"':
        result += "&#34;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

std::string indented(const std::string& text, const std::string& by, bool first, bool blank) {
  std::string result;
  const List lines = lines_of(text + "\n", false);
  for (size_t i = 0; i < lines.items.size(); ++i) {
    const std::string& line = *lines.items[i].string();
    if (i > 0) result += '\n';
    if (i == 0 ? first : (blank || !line.empty())) result += by;
    result += line;
  }
  return result;
}

}  // namespace natslm::data::jinja
