// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/value.h"

#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "natslm/base/error.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data::jinja {
namespace {

// Lists and dicts cannot contain themselves, but may be nested by a template's loop.
constexpr int kDeepest = 200;

bool is_printable(uint32_t c) {
  if (c == ' ') return true;
  const int category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category != UTF8PROC_CATEGORY_CN && category < UTF8PROC_CATEGORY_ZS;
}

void append_escape(uint32_t c, std::string& result) {
  char escape[16];
  const char* form = c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x";
  std::snprintf(escape, sizeof escape, form, c);
  result += escape;
}

void print_quoted(std::string_view text, std::string& result) {
  const bool both = text.find('"') != text.npos;
  const char quote = text.find('\'') != text.npos && !both ? '"' : '\'';
  result += quote;
  for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
    if (c.value == static_cast<unsigned char>(quote) || c.value == '\\') {
      (result += '\\') += bytes;
    } else if (c.value == '\n') {
      result += "\\n";
    } else if (c.value == '\r') {
      result += "\\r";
    } else if (c.value == '\t') {
      result += "\\t";
    } else if (c.value == kNoCharacter || is_printable(c.value)) {
      result += bytes;
    } else {
      append_escape(c.value, result);
    }
  });
  result += quote;
}

void json_string(std::string_view text, bool ascii, std::string& result) {
  result += '"';
  for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
    const auto unit = [&](uint32_t value) {
      char escape[16];
      std::snprintf(escape, sizeof escape, "\\u%04x", value);
      result += escape;
    };
    constexpr std::pair<uint32_t, const char*> kShort[] = {
        {'"', "\\\""}, {'\\', "\\\\"}, {'\n', "\\n"}, {'\r', "\\r"},
        {'\t', "\\t"}, {'\b', "\\b"},  {'\f', "\\f"}};
    for (const auto& [character, escape] : kShort) {
      if (c.value == character) {
        result += escape;
        return;
      }
    }
    if (c.value < 0x20 || (ascii && c.value >= 0x7F && c.value < 0x10000)) {
      c.value == 0x7F ? void(result += bytes) : unit(c.value);
    } else if (ascii && c.value >= 0x10000 && c.value != kNoCharacter) {
      unit(0xD800 + ((c.value - 0x10000) >> 10));
      unit(0xDC00 + ((c.value - 0x10000) & 0x3FF));
    } else {
      result += bytes;
    }
  });
  result += '"';
}

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, std::string& result) : style_(style), result_(result) {}

  void write(const Value& value, int level) {
    NATSLM_CHECK(level < kDeepest, "values nested deeper than ", kDeepest, " levels");
    if (value.is_none()) {
      result_ += "null";
    } else if (const bool* flag = value.boolean()) {
      result_ += *flag ? "true" : "false";
    } else if (const double* real = value.real()) {
      result_ += std::isnan(*real)   ? "NaN"
                 : std::isinf(*real) ? (*real > 0 ? "Infinity" : "-Infinity")
                                     : real_text(*real);
    } else if (value.integer()) {
      result_ += value.text();
    } else if (const std::string* text = value.string()) {
      json_string(*text, style_.ascii, result_);
    } else if (const List* list = value.list()) {
      group('[', ']', list->items.size(), level,
            [&](size_t i) { write(list->items[i], level + 1); });
    } else if (const Dict* dict = value.dict()) {
      std::vector<const std::pair<Value, Value>*> items;
      for (const auto& item : dict->items()) items.push_back(&item);
      if (style_.sorted) {
        std::ranges::stable_sort(
            items, [](const auto* a, const auto* b) { return compare(a->first, b->first) < 0; });
      }
      group('{', '}', items.size(), level, [&](size_t i) {
        const Value& key = items[i]->first;
        json_string(key.boolean()   ? (*key.boolean() ? "true" : "false")
                    : key.is_none() ? "null"
                                    : key.text(),
                    style_.ascii, result_);
        result_ += style_.key;
        write(items[i]->second, level + 1);
      });
    } else {
      fail("tojson: a ", value.type_name(), " cannot be written as JSON");
    }
  }

 private:
  template <class Item>
  void group(char open, char close, size_t count, int level, Item&& item) {
    result_ += open;
    for (size_t i = 0; i < count; ++i) {
      if (i > 0) result_ += style_.item;
      new_line(level + 1);
      item(i);
    }
    if (count > 0) new_line(level);
    result_ += close;
  }
  void new_line(int level) {
    if (style_.indent < 0) return;
    result_ += '\n';
    result_.append(static_cast<size_t>(style_.indent) * level, ' ');
  }

  const JsonStyle& style_;
  std::string& result_;
};

bool equal_at(const Value& a, const Value& b, int depth) {
  NATSLM_CHECK(depth < kDeepest, "values nested deeper than ", kDeepest, " levels");
  if (a.integer() && b.integer()) return *a.integer() == *b.integer();
  if (a.is_number() && b.is_number()) return a.number() == b.number();
  if (a.string() && b.string()) return *a.string() == *b.string();
  if (a.is_none() || a.is_undefined())
    return a.is_none() == b.is_none() && a.is_undefined() == b.is_undefined();
  if (a.list() && b.list()) {
    return a.list()->tuple == b.list()->tuple &&
           std::ranges::equal(
               a.list()->items, b.list()->items,
               [&](const Value& x, const Value& y) { return equal_at(x, y, depth + 1); });
  }
  if (a.dict() && b.dict()) {
    if (a.dict()->items().size() != b.dict()->items().size()) return false;
    return std::ranges::all_of(a.dict()->items(), [&](const auto& item) {
      const Value* other = b.dict()->find(item.first);
      return other && equal_at(item.second, *other, depth + 1);
    });
  }
  return (a.callable() && a.callable() == b.callable()) || (a.space() && a.space() == b.space()) ||
         (a.loop() && a.loop() == b.loop());
}

}  // namespace

std::string Dict::index_key(const Value& key) {
  NATSLM_CHECK(!key.list() || key.list()->tuple, "a list cannot be a key");
  NATSLM_CHECK(!key.dict(), "a dict cannot be a key");
  if (key.string()) return "s" + *key.string();
  if (key.integer()) return "n" + std::to_string(*key.integer());
  if (key.boolean()) return *key.boolean() ? "n1" : "n0";
  if (const double* real = key.real()) {
    const bool whole = std::floor(*real) == *real && std::abs(*real) < 9e15;
    return "n" + (whole ? std::to_string(static_cast<int64_t>(*real)) : real_text(*real));
  }
  return "o" + key.repr();
}

const Value* Dict::find(const Value& key) const {
  const auto found = index_.find(index_key(key));
  return found == index_.end() ? nullptr : &items_[found->second].second;
}

const Value* Dict::find(std::string_view key) const {
  const auto found = index_.find("s" + std::string(key));
  return found == index_.end() ? nullptr : &items_[found->second].second;
}

void Dict::set(const Value& key, Value value) {
  const auto [found, fresh] = index_.try_emplace(index_key(key), items_.size());
  if (fresh) {
    items_.emplace_back(key, std::move(value));
  } else {
    items_[found->second].second = std::move(value);
  }
}

Value Value::of(const nlohmann::ordered_json& json) {
  using Type = nlohmann::json::value_t;
  switch (json.type()) {
    case Type::boolean:
      return json.get<bool>();
    case Type::number_integer:
    case Type::number_unsigned:
      NATSLM_CHECK(!json.is_number_unsigned() || json.get<uint64_t>() <= uint64_t{INT64_MAX},
                   "the number ", json.get<uint64_t>(), " is too large for a template");
      return json.get<int64_t>();
    case Type::number_float:
      return json.get<double>();
    case Type::string:
      return json.get<std::string>();
    case Type::array: {
      List list;
      for (const auto& item : json) list.items.push_back(of(item));
      return list;
    }
    case Type::object: {
      Dict dict;
      for (const auto& [key, item] : json.items()) dict.set(Value(key), of(item));
      return dict;
    }
    default:
      return {};
  }
}

double Value::number() const {
  if (boolean()) return *boolean() ? 1 : 0;
  if (integer()) return static_cast<double>(*integer());
  NATSLM_CHECK(real(), "a number is needed, this is a ", type_name());
  return *real();
}

int64_t Value::whole_number(std::string_view what) const {
  if (boolean()) return *boolean() ? 1 : 0;
  NATSLM_CHECK(integer(), what, " must be a whole number, this is a ", type_name());
  return *integer();
}

const std::string& Value::need_string(std::string_view what) const {
  if (undefined()) fail(what, ": \"", undefined()->name, "\" is undefined");
  NATSLM_CHECK(string(), what, " needs a string, this is a ", type_name());
  return *string();
}

bool Value::truth() const {
  if (boolean()) return *boolean();
  if (integer()) return *integer() != 0;
  if (real()) return *real() != 0;
  if (string()) return !string()->empty();
  if (list()) return !list()->items.empty();
  if (dict()) return !dict()->items().empty();
  return !is_none() && !is_undefined();
}

std::string Value::type_name() const {
  constexpr const char* kNames[] = {"value that is not defined",
                                    "None",
                                    "boolean",
                                    "whole number",
                                    "number",
                                    "string",
                                    "list",
                                    "dict",
                                    "function",
                                    "namespace",
                                    "loop"};
  return kNames[kind_.index()];
}

std::string Value::text() const {
  if (string()) return *string();
  std::string result;
  print(result, false, 0);
  return result;
}

std::string Value::repr() const {
  std::string result;
  print(result, true, 0);
  return result;
}

void Value::print(std::string& result, bool inside, int depth) const {
  NATSLM_CHECK(depth < kDeepest, "values nested deeper than ", kDeepest, " levels");
  if (is_undefined()) {
    if (inside) result += "Undefined";
  } else if (is_none()) {
    result += "None";
  } else if (boolean()) {
    result += *boolean() ? "True" : "False";
  } else if (integer()) {
    result += std::to_string(*integer());
  } else if (real()) {
    result += real_text(*real());
  } else if (string()) {
    inside ? print_quoted(*string(), result) : void(result += *string());
  } else if (list()) {
    const bool tuple = list()->tuple;
    const size_t count = list()->items.size();
    result += tuple ? '(' : '[';
    for (size_t i = 0; i < count; ++i) {
      if (i > 0) result += ", ";
      list()->items[i].print(result, true, depth + 1);
    }
    if (tuple && count == 1) result += ',';
    result += tuple ? ')' : ']';
  } else if (dict()) {
    result += '{';
    const char* separator = "";
    for (const auto& [key, value] : dict()->items()) {
      result += separator;
      key.print(result, true, depth + 1);
      result += ": ";
      value.print(result, true, depth + 1);
      separator = ", ";
    }
    result += '}';
  } else {
    fail("a ", type_name(), " cannot be printed");
  }
}

bool equal(const Value& a, const Value& b) {
  return equal_at(a, b, 0);
}

int compare(const Value& a, const Value& b) {
  if (a.integer() && b.integer()) {
    return (*a.integer() > *b.integer()) - (*a.integer() < *b.integer());
  }
  if (a.is_number() && b.is_number()) return (a.number() > b.number()) - (a.number() < b.number());
  if (a.string() && b.string()) {  // UTF-8 keeps the order of code points
    const int order = a.string()->compare(*b.string());
    return (order > 0) - (order < 0);
  }
  if (a.list() && b.list()) {
    const auto &x = a.list()->items, &y = b.list()->items;
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      if (!equal(x[i], y[i])) return compare(x[i], y[i]);
    }
    return (x.size() > y.size()) - (x.size() < y.size());
  }
  fail("a ", a.type_name(), " and a ", b.type_name(), " have no order");
}

std::string to_json(const Value& value, const JsonStyle& style) {
  std::string result;
  JsonWriter(style, result).write(value, 0);
  return result;
}

std::string real_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char digits[32];
  const auto end =
      std::to_chars(digits, digits + sizeof digits, value, std::chars_format::scientific);
  const std::string shortest(digits, end.ptr);
  const int exponent = std::atoi(shortest.c_str() + shortest.find('e') + 1);
  if (exponent < -4 || exponent >= 16) return shortest;
  const auto fixed = std::to_chars(digits, digits + sizeof digits, value, std::chars_format::fixed);
  const std::string plain(digits, fixed.ptr);
  return plain.find('.') == plain.npos ? plain + ".0" : plain;
}

size_t length_of(std::string_view text) {
  size_t length = 0;
  for_each_character(text, [&](const CodePoint&, std::string_view) { ++length; });
  return length;
}

std::vector<size_t> character_offsets(std::string_view text) {
  std::vector<size_t> offsets;
  for (size_t at = 0; at < text.size(); at += char_at(text, at).bytes) offsets.push_back(at);
  offsets.push_back(text.size());
  return offsets;
}

}  // namespace natslm::data::jinja
