// Attributes, methods, functions, filters and tests, each with the meaning of Jinja 3.1 in the form
// that `transformers` sets up (tojson is json.dumps; raise_exception and strftime_now are there).
// SPDX-License-Identifier: Apache-2.0
#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>

#include "natslm/base/error.h"
#include "natslm/data/jinja/renderer.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data::jinja {
namespace {

// ---- arguments
// ----------------------------------------------------------------------------------- Takes the
// arguments of one call by place or name.
class Take {
 public:
  Take(std::string_view function, const Arguments& arguments)
      : function_(function), arguments_(arguments), used_(arguments.named.size()) {}

  // The next argument, or the one with this name; nullptr: not given.
  const Value* optional(std::string_view name) {
    const size_t place = place_++;
    if (place < arguments_.positional.size()) return &arguments_.positional[place];
    for (size_t i = 0; i < arguments_.named.size(); ++i) {
      if (arguments_.named[i].first != name) continue;
      used_[i] = true;
      return &arguments_.named[i].second;
    }
    return nullptr;
  }
  const Value& needed(std::string_view name) {
    const Value* value = optional(name);
    NATSLM_CHECK(value, function_, " needs its argument ", name);
    return *value;
  }
  bool flag(std::string_view name, bool otherwise) {
    const Value* value = optional(name);
    return value ? value->truth() : otherwise;
  }
  int64_t whole(std::string_view name, int64_t otherwise) {
    const Value* value = optional(name);
    return value ? value->whole_number(name) : otherwise;
  }
  void done() const {
    NATSLM_CHECK(arguments_.positional.size() <= place_, function_, " has no ", place_ + 1,
                 ". argument");
    for (size_t i = 0; i < used_.size(); ++i) {
      NATSLM_CHECK(used_[i], function_, " has no argument ", arguments_.named[i].first);
    }
  }

 private:
  std::string_view function_;
  const Arguments& arguments_;
  std::vector<bool> used_;
  size_t place_ = 0;
};

// ---- text
// ----------------------------------------------------------------------------------------
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

// str.title(): each letter that follows no letter.
std::string titled(std::string_view text) {
  bool inside = false;
  return each_character(text, [&](uint32_t c, std::string& result) {
    inside ? append_lower(c, result) : append_upper(c, result);
    inside = class_of(c) == CharClass::kLetter;
  });
}

// The filter: each word, where white space and opening brackets end words.
std::string title_words(std::string_view text) {
  bool begins = true;
  return each_character(text, [&](uint32_t c, std::string& result) {
    begins ? append_upper(c, result) : append_lower(c, result);
    begins = c == '-' || c == '(' || c == '{' || c == '[' || c == '<' ||
             class_of(c) == CharClass::kSpace;
  });
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

// set: characters to strip; nullptr: white space.
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

// ---- values
// --------------------------------------------------------------------------------------
const std::string& name_of(const Value& value, std::string_view what) {
  return value.need_string(what);
}

// "a.b.0" of an object, as map, sort and the rest name it.
Value member(const Value& object, const Value& path) {
  if (path.integer()) return subscript(object, path);
  Value value = object;
  const std::string& text = name_of(path, "attribute");
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('.', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    int64_t index = 0;
    const auto parsed = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool number = !part.empty() && parsed.ptr == part.data() + part.size();
    value = subscript(value, number ? Value(index) : Value(part));
    begin = end + 1;
  }
  return value;
}

// Upper and lower case are the same to sort, unique, min and max unless told otherwise.
Value folded(const Value& value, bool case_sensitive) {
  return value.string() && !case_sensitive ? Value(lower(*value.string())) : value;
}

void sort_by(Renderer& renderer, std::vector<Value>& items, const Value* path, bool case_sensitive,
             bool reverse) {
  renderer.charge(16 * items.size());
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : items) {
    keyed.emplace_back(folded(path ? member(item, *path) : item, case_sensitive), item);
  }
  std::ranges::stable_sort(keyed, [&](const auto& a, const auto& b) {
    return reverse ? compare(b.first, a.first) < 0 : compare(a.first, b.first) < 0;
  });
  for (size_t i = 0; i < items.size(); ++i) items[i] = keyed[i].second;
}

Value dict_items(const Dict& dict) {
  List items;
  for (const auto& [key, value] : dict.items()) items.items.emplace_back(List{{key, value}, true});
  return items;
}

// int(x, base) of the filter; `otherwise` for what is no number.
Value as_integer(const Value& value, const Value& otherwise, int64_t base) {
  if (value.integer()) return value;
  if (value.boolean()) return value.whole_number("");
  if (value.real()) {
    const bool fits = std::abs(*value.real()) < 9e18;
    return fits ? Value(static_cast<int64_t>(*value.real())) : otherwise;
  }
  if (!value.string()) return otherwise;
  std::string text = stripped(*value.string(), nullptr, true, true);
  if (text.starts_with('+')) text.erase(0, 1);
  int64_t number = 0;
  const auto parsed =
      std::from_chars(text.data(), text.data() + text.size(), number, static_cast<int>(base));
  if (!text.empty() && parsed.ec == std::errc() && parsed.ptr == text.data() + text.size()) {
    return number;
  }
  double real = 0;
  const auto as_real = std::from_chars(text.data(), text.data() + text.size(), real);
  const bool whole = !text.empty() && as_real.ec == std::errc() &&
                     as_real.ptr == text.data() + text.size() && std::abs(real) < 9e18;
  return whole ? Value(static_cast<int64_t>(real)) : otherwise;
}

Value as_real(const Value& value, const Value& otherwise) {
  if (value.is_number()) return value.number();
  if (!value.string()) return otherwise;
  const std::string text = stripped(*value.string(), nullptr, true, true);
  double real = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), real);
  const bool fine =
      !text.empty() && parsed.ec == std::errc() && parsed.ptr == text.data() + text.size();
  return fine ? Value(real) : otherwise;
}

Value rounded(const Value& value, int64_t digits, const std::string& method) {
  NATSLM_CHECK(digits >= -15 && digits <= 15, "round: ", digits, " digits");
  const double scale = std::pow(10.0, static_cast<double>(digits));
  const double scaled = value.number() * scale;
  if (method == "ceil") return std::ceil(scaled) / scale;
  if (method == "floor") return std::floor(scaled) / scale;
  NATSLM_CHECK(method == "common", "round: there is no method ", method);
  // Python rounds the decimal value exactly, halves to even.
  char text[64];
  if (digits >= 0) {
    std::snprintf(text, sizeof text, "%.*f", static_cast<int>(digits), value.number());
    return std::strtod(text, nullptr);
  }
  return std::nearbyint(scaled) / scale;
}

std::string formatted_time(const std::string& format, std::time_t now) {
  if (format.empty()) return "";
  std::tm local{};
  localtime_r(&now, &local);
  std::string text(format.size() * 16 + 64, '\0');
  text.resize(std::strftime(text.data(), text.size(), format.c_str(), &local));
  return text;
}

// ---- methods
// -------------------------------------------------------------------------------------
using Method = Value (*)(Renderer&, const Value&, Arguments&);

const std::string& self(const Value& object) {
  return *object.string();
}

template <bool kLeft, bool kRight>
Value strip_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take("strip", arguments);
  const Value* set = take.optional("chars");
  take.done();
  const bool given = set && !set->is_none();
  return stripped(self(object), given ? &set->need_string("strip") : nullptr, kLeft, kRight);
}

template <bool kFromRight>
Value split_method(Renderer& renderer, const Value& object, Arguments& arguments) {
  Take take("split", arguments);
  const Value* separator = take.optional("sep");
  const int64_t most = take.whole("maxsplit", -1);
  take.done();
  renderer.charge(self(object).size());
  return split(self(object), separator, most, kFromRight);
}

template <bool kStart>
Value edge_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take(kStart ? "startswith" : "endswith", arguments);
  const Value& wanted = take.needed("prefix");
  take.done();
  const auto has = [&](const Value& one) {
    const std::string& text = one.need_string(kStart ? "startswith" : "endswith");
    return kStart ? self(object).starts_with(text) : self(object).ends_with(text);
  };
  return wanted.list() ? std::ranges::any_of(wanted.list()->items, has) : has(wanted);
}

// In characters, or -1.
template <bool kLast>
Value find_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take("find", arguments);
  const std::string& wanted = take.needed("sub").need_string("find");
  take.done();
  const size_t at = kLast ? self(object).rfind(wanted) : self(object).find(wanted);
  if (at == std::string::npos) return int64_t{-1};
  return static_cast<int64_t>(length_of(std::string_view(self(object)).substr(0, at)));
}

template <std::string (*kChange)(std::string_view)>
Value change_method(Renderer&, const Value& object, Arguments& arguments) {
  Take("this method", arguments).done();
  return kChange(self(object));
}

Value replace_method(Renderer& renderer, const Value& object, Arguments& arguments) {
  Take take("replace", arguments);
  const std::string& from = take.needed("old").need_string("replace");
  const std::string& to = take.needed("new").need_string("replace");
  const int64_t count = take.whole("count", -1);
  take.done();
  return replaced(renderer, self(object), from, to, count);
}

Value join_method(Renderer& renderer, const Value& object, Arguments& arguments) {
  Take take("join", arguments);
  const std::vector<Value> items = iterate(take.needed("iterable"));
  take.done();
  std::string text;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) text += self(object);
    text += items[i].need_string("join");
  }
  renderer.charge(text.size());
  return text;
}

Value count_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take("count", arguments);
  const Value& wanted = take.needed("sub");
  take.done();
  if (object.list()) {
    return static_cast<int64_t>(std::ranges::count_if(
        object.list()->items, [&](const Value& one) { return equal(one, wanted); }));
  }
  const std::string& text = wanted.need_string("count");
  if (text.empty()) return static_cast<int64_t>(length_of(self(object)) + 1);
  int64_t count = 0;
  for (size_t at = 0; (at = self(object).find(text, at)) != std::string::npos; at += text.size()) {
    ++count;
  }
  return count;
}

template <bool kPrefix>
Value remove_edge_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take(kPrefix ? "removeprefix" : "removesuffix", arguments);
  const std::string& edge = take.needed("prefix").need_string("removeprefix");
  take.done();
  std::string text = self(object);
  if (kPrefix && text.starts_with(edge)) text.erase(0, edge.size());
  if (!kPrefix && text.ends_with(edge)) text.resize(text.size() - edge.size());
  return text;
}

template <bool (*kIs)(const CodePoint&)>
Value all_method(Renderer&, const Value& object, Arguments& arguments) {
  Take("this method", arguments).done();
  bool all = !self(object).empty();
  for_each_character(self(object), [&](const CodePoint& c, std::string_view) { all &= kIs(c); });
  return all;
}
bool is_number(const CodePoint& c) {
  return c.kind == CharClass::kNumber;
}
bool is_letter(const CodePoint& c) {
  return c.kind == CharClass::kLetter;
}
bool is_letter_or_number(const CodePoint& c) {
  return is_number(c) || is_letter(c);
}
bool is_white(const CodePoint& c) {
  return c.kind == CharClass::kSpace;
}

Value splitlines_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take("splitlines", arguments);
  const bool keep = take.flag("keepends", false);
  take.done();
  return lines_of(self(object), keep);
}

Value upper_test_method(Renderer&, const Value& object, Arguments&) {
  return self(object) == upper(self(object)) && self(object) != lower(self(object));
}
Value lower_test_method(Renderer&, const Value& object, Arguments&) {
  return self(object) == lower(self(object)) && self(object) != upper(self(object));
}

const std::map<std::string_view, Method> kTextMethods = {
    {"strip", strip_method<true, true>},
    {"lstrip", strip_method<true, false>},
    {"rstrip", strip_method<false, true>},
    {"split", split_method<false>},
    {"rsplit", split_method<true>},
    {"splitlines", splitlines_method},
    {"startswith", edge_method<true>},
    {"endswith", edge_method<false>},
    {"find", find_method<false>},
    {"rfind", find_method<true>},
    {"upper", change_method<upper>},
    {"lower", change_method<lower>},
    {"title", change_method<titled>},
    {"capitalize", change_method<capitalized>},
    {"replace", replace_method},
    {"join", join_method},
    {"count", count_method},
    {"removeprefix", remove_edge_method<true>},
    {"removesuffix", remove_edge_method<false>},
    {"isdigit", all_method<is_number>},
    {"isnumeric", all_method<is_number>},
    {"isalpha", all_method<is_letter>},
    {"isalnum", all_method<is_letter_or_number>},
    {"isspace", all_method<is_white>},
    {"isupper", upper_test_method},
    {"islower", lower_test_method},
};

Value get_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take("get", arguments);
  const Value& key = take.needed("key");
  const Value* otherwise = take.optional("default");
  take.done();
  const Value* found = object.dict()->find(key);
  return found ? *found : otherwise ? *otherwise : Value();
}
Value items_method(Renderer&, const Value& object, Arguments&) {
  return dict_items(*object.dict());
}
Value keys_method(Renderer&, const Value& object, Arguments&) {
  return List{iterate(object)};
}
Value values_method(Renderer&, const Value& object, Arguments&) {
  List values;
  for (const auto& [key, value] : object.dict()->items()) values.items.push_back(value);
  return values;
}

const std::map<std::string_view, Method> kDictMethods = {
    {"get", get_method}, {"items", items_method}, {"keys", keys_method}, {"values", values_method}};

Value index_method(Renderer&, const Value& object, Arguments& arguments) {
  Take take("index", arguments);
  const Value& wanted = take.needed("value");
  take.done();
  const auto& items = object.list()->items;
  const auto found = std::ranges::find_if(items, [&](const Value& v) { return equal(v, wanted); });
  NATSLM_CHECK(found != items.end(), "index: ", wanted.repr(), " is not in the list");
  return static_cast<int64_t>(found - items.begin());
}

const std::map<std::string_view, Method> kListMethods = {{"count", count_method},
                                                         {"index", index_method}};

Value bound(const std::map<std::string_view, Method>& methods, const Value& object,
            const std::string& name) {
  const auto found = methods.find(name);
  if (found == methods.end()) return Value::undefined(object.type_name() + "." + name);
  return Callable{name, [method = found->second, object](Renderer& renderer, Arguments& arguments) {
                    return method(renderer, object, arguments);
                  }};
}

Value loop_member(const LoopState& loop, const Value& self_value, const std::string& name) {
  NATSLM_CHECK(loop.items, "\"loop\" is used after its loop");
  const auto size = static_cast<int64_t>(loop.items->size());
  const auto index = static_cast<int64_t>(loop.index);
  if (name == "index") return index + 1;
  if (name == "index0") return index;
  if (name == "revindex") return size - index;
  if (name == "revindex0") return size - index - 1;
  if (name == "first") return index == 0;
  if (name == "last") return index + 1 == size;
  if (name == "length") return size;
  if (name == "depth") return static_cast<int64_t>(loop.depth);
  if (name == "depth0") return static_cast<int64_t>(loop.depth) - 1;
  if (name == "previtem") {
    return index > 0 ? (*loop.items)[index - 1] : Value::undefined("loop.previtem");
  }
  if (name == "nextitem") {
    return index + 1 < size ? (*loop.items)[index + 1] : Value::undefined("loop.nextitem");
  }
  if (name == "cycle") {
    return Callable{"cycle", [self_value](Renderer&, Arguments& arguments) {
                      NATSLM_CHECK(!arguments.positional.empty(), "cycle needs arguments");
                      const size_t at = self_value.loop()->index % arguments.positional.size();
                      return arguments.positional[at];
                    }};
  }
  return Value::undefined("loop." + name);
}

// ---- functions
// -----------------------------------------------------------------------------------
Value range_function(Renderer& renderer, Arguments& arguments) {
  Take take("range", arguments);
  const int64_t a = take.needed("stop").whole_number("range");
  const Value* b = take.optional("stop");
  const int64_t step = take.whole("step", 1);
  take.done();
  NATSLM_CHECK(step != 0, "range: the step is 0");
  const int64_t from = b ? a : 0, to = b ? b->whole_number("range") : a;
  constexpr int64_t kMost = 100000;  // as in Jinja's sandbox
  List list;
  for (int64_t i = from; step > 0 ? i < to : i > to;) {
    NATSLM_CHECK(list.items.size() < kMost, "range: more than ", kMost, " numbers");
    list.items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  renderer.charge(list.items.size());
  return list;
}

Dict dict_of(Arguments& arguments) {
  Dict dict;
  for (const Value& one : arguments.positional) {
    NATSLM_CHECK(one.dict(), "dict() of a ", one.type_name(), " is not supported");
    for (const auto& [key, value] : one.dict()->items()) dict.set(key, value);
  }
  for (const auto& [name, value] : arguments.named) dict.set(Value(name), value);
  return dict;
}

// ---- filters
// -------------------------------------------------------------------------------------
using Filter = Value (*)(Renderer&, const Value&, Arguments&);

// select, reject and their kin: which items pass.
Value chosen(Renderer& renderer, const Value& value, Arguments& arguments, bool by_attribute,
             bool wanted) {
  Arguments rest = arguments;
  Value path;
  const auto shift = [&] {
    Value first = rest.positional.front();
    rest.positional.erase(rest.positional.begin());
    return first;
  };
  if (by_attribute) {
    NATSLM_CHECK(!rest.positional.empty(), "selectattr needs the name of an attribute");
    path = shift();
  }
  std::string test;
  if (!rest.positional.empty()) {
    test = name_of(shift(), "select");
    NATSLM_CHECK(is_test(test), "the test \"", test, "\" is not supported");
  }
  List result;
  for (const Value& item : iterate(value)) {
    renderer.step();
    const Value tested = by_attribute ? member(item, path) : item;
    Arguments copy = rest;
    const bool passes = test.empty() ? tested.truth() : apply_test(renderer, test, tested, copy);
    if (passes == wanted) result.items.push_back(item);
  }
  return result;
}

Value map_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  List result;
  const std::vector<Value> items = iterate(value);
  if (arguments.positional.empty()) {
    Take take("map", arguments);
    const Value& path = take.needed("attribute");
    const Value* otherwise = take.optional("default");
    take.done();
    for (const Value& item : items) {
      Value found = member(item, path);
      result.items.push_back(found.is_undefined() && otherwise ? *otherwise : found);
    }
    return result;
  }
  Arguments rest = arguments;
  const std::string filter = name_of(rest.positional.front(), "map");
  NATSLM_CHECK(is_filter(filter), "the filter \"", filter, "\" is not supported");
  rest.positional.erase(rest.positional.begin());
  for (const Value& item : items) {
    renderer.step();
    Arguments copy = rest;
    result.items.push_back(apply_filter(renderer, filter, item, copy));
  }
  return result;
}

Value tojson_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("tojson", arguments);
  JsonStyle style;
  style.ascii = take.flag("ensure_ascii", false);
  const Value* indent = take.optional("indent");
  const Value* separators = take.optional("separators");
  style.sorted = take.flag("sort_keys", false);
  take.done();
  if (indent && !indent->is_none()) {
    const int64_t width = indent->whole_number("indent");
    NATSLM_CHECK(width >= 0 && width <= 64, "tojson: an indent of ", width);
    style.indent = static_cast<int>(width);
    style.item = ",";
  }
  if (separators && !separators->is_none()) {
    NATSLM_CHECK(separators->list() && separators->list()->items.size() == 2,
                 "tojson: separators must be two strings");
    style.item = separators->list()->items[0].need_string("tojson");
    style.key = separators->list()->items[1].need_string("tojson");
  }
  std::string text = to_json(value, style);
  renderer.charge(text.size());
  return text;
}

Value length_filter(Renderer&, const Value& value, Arguments&) {
  if (value.string()) return static_cast<int64_t>(length_of(*value.string()));
  if (value.dict()) return static_cast<int64_t>(value.dict()->items().size());
  NATSLM_CHECK(value.list() || value.is_undefined(), "a ", value.type_name(), " has no length");
  return value.list() ? static_cast<int64_t>(value.list()->items.size()) : int64_t{0};
}

Value default_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("default", arguments);
  const Value* otherwise = take.optional("default_value");
  const bool also_false = take.flag("boolean", false);
  take.done();
  const bool missing = value.is_undefined() || (also_false && !value.truth());
  return !missing ? value : otherwise ? *otherwise : Value("");
}

Value join_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("join", arguments);
  const Value* between = take.optional("d");
  const Value* path = take.optional("attribute");
  take.done();
  const std::string separator = between ? between->text() : "";
  std::string text;
  bool first = true;
  for (const Value& item : iterate(value)) {
    if (!first) text += separator;
    text += (path ? member(item, *path) : item).text();
    first = false;
    NATSLM_CHECK(text.size() < Renderer::kMostWork, "join: the text is too long");
  }
  renderer.charge(text.size());
  return text;
}

Value trim_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("trim", arguments);
  const Value* set = take.optional("chars");
  take.done();
  const bool given = set && !set->is_none();
  return stripped(value.text(), given ? &set->need_string("trim") : nullptr, true, true);
}

Value replace_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("replace", arguments);
  const std::string from = take.needed("old").text(), to = take.needed("new").text();
  const Value* count = take.optional("count");
  take.done();
  const bool counted = count && !count->is_none();
  return replaced(renderer, value.text(), from, to, counted ? count->whole_number("count") : -1);
}

Value indent_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("indent", arguments);
  const Value* width = take.optional("width");
  const bool first = take.flag("first", false), blank = take.flag("blank", false);
  take.done();
  std::string by(4, ' ');
  if (width && width->string()) by = *width->string();
  if (width && !width->string()) {
    const int64_t spaces = width->whole_number("width");
    NATSLM_CHECK(spaces <= 1000, "indent: a width of ", spaces);
    by.assign(static_cast<size_t>(std::max<int64_t>(spaces, 0)), ' ');
  }
  std::string text = indented(value.text(), by, first, blank);
  renderer.charge(text.size());
  return text;
}

Value sort_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("sort", arguments);
  const bool reverse = take.flag("reverse", false), sensitive = take.flag("case_sensitive", false);
  const Value* path = take.optional("attribute");
  take.done();
  List list{iterate(value)};
  sort_by(renderer, list.items, path && !path->is_none() ? path : nullptr, sensitive, reverse);
  return list;
}

Value dictsort_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("dictsort", arguments);
  const bool sensitive = take.flag("case_sensitive", false);
  const Value* by = take.optional("by");
  const bool reverse = take.flag("reverse", false);
  take.done();
  NATSLM_CHECK(value.dict(), "dictsort of a ", value.type_name());
  const Value place(int64_t{by && by->text() == "value" ? 1 : 0});
  List list{iterate(dict_items(*value.dict()))};
  sort_by(renderer, list.items, &place, sensitive, reverse);
  return list;
}

Value unique_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("unique", arguments);
  const bool sensitive = take.flag("case_sensitive", false);
  const Value* path = take.optional("attribute");
  take.done();
  Dict seen;
  List result;
  for (const Value& item : iterate(value)) {
    renderer.step();
    const Value key = folded(path ? member(item, *path) : item, sensitive);
    if (seen.find(key)) continue;
    seen.set(key, true);
    result.items.push_back(item);
  }
  return result;
}

template <int kSign>
Value extreme_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take(kSign < 0 ? "min" : "max", arguments);
  const bool sensitive = take.flag("case_sensitive", false);
  const Value* path = take.optional("attribute");
  take.done();
  std::vector<Value> items = iterate(value);
  if (items.empty()) return Value::undefined("the first of no items");
  sort_by(renderer, items, path, sensitive, kSign > 0);
  return items[0];
}

Value sum_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("sum", arguments);
  const Value* path = take.optional("attribute");
  const Value* start = take.optional("start");
  take.done();
  bool whole = !start || !start->real();
  double total = start ? start->number() : 0;
  int64_t exact = start && whole ? start->whole_number("sum") : 0;
  for (const Value& item : iterate(value)) {
    const Value one = path && !path->is_none() ? member(item, *path) : item;
    total += one.number();
    whole &= !one.real();
    if (whole) {
      NATSLM_CHECK(!__builtin_add_overflow(exact, one.whole_number("sum"), &exact),
                   "sum: the number is too large");
    }
  }
  return whole ? Value(exact) : Value(total);
}

Value batch_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  Take take("batch", arguments);
  const int64_t size = take.needed("linecount").whole_number("batch");
  const Value* fill = take.optional("fill_with");
  take.done();
  NATSLM_CHECK(size > 0 && size <= 100000, "batch: ", size, " items");
  List batches, batch;
  for (const Value& item : iterate(value)) {
    renderer.step();
    batch.items.push_back(item);
    if (static_cast<int64_t>(batch.items.size()) < size) continue;
    batches.items.emplace_back(std::exchange(batch, {}));
  }
  if (!batch.items.empty()) {
    if (fill && !fill->is_none()) batch.items.resize(static_cast<size_t>(size), *fill);
    batches.items.emplace_back(batch);
  }
  return batches;
}

template <bool kFirst>
Value edge_filter(Renderer&, const Value& value, Arguments&) {
  const std::vector<Value> items = iterate(value);
  if (items.empty()) return Value::undefined("an item of no items");
  return kFirst ? items.front() : items.back();
}

Value reverse_filter(Renderer&, const Value& value, Arguments&) {
  List list{iterate(value)};
  std::ranges::reverse(list.items);
  if (!value.string()) return list;
  std::string text;
  for (const Value& item : list.items) text += *item.string();
  return text;
}

Value list_filter(Renderer&, const Value& value, Arguments&) {
  return List{iterate(value)};
}
Value string_filter(Renderer&, const Value& value, Arguments&) {
  return value.text();
}
template <std::string (*kChange)(std::string_view)>
Value change_filter(Renderer&, const Value& value, Arguments&) {
  return kChange(value.text());
}
template <bool kByAttribute, bool kWanted>
Value choose_filter(Renderer& renderer, const Value& value, Arguments& arguments) {
  return chosen(renderer, value, arguments, kByAttribute, kWanted);
}

Value items_filter(Renderer&, const Value& value, Arguments&) {
  if (value.is_undefined()) return List{};
  NATSLM_CHECK(value.dict(), "items of a ", value.type_name());
  return dict_items(*value.dict());
}

Value int_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("int", arguments);
  const Value* otherwise = take.optional("default");
  const int64_t base = take.whole("base", 10);
  take.done();
  NATSLM_CHECK(base >= 2 && base <= 36, "int: base ", base);
  return as_integer(value, otherwise ? *otherwise : Value(int64_t{0}), base);
}

Value float_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("float", arguments);
  const Value* otherwise = take.optional("default");
  take.done();
  return as_real(value, otherwise ? *otherwise : Value(0.0));
}

Value abs_filter(Renderer&, const Value& value, Arguments&) {
  if (value.real()) return std::abs(*value.real());
  const int64_t whole = value.whole_number("abs");
  NATSLM_CHECK(whole != std::numeric_limits<int64_t>::min(), "abs: the number is too large");
  return whole < 0 ? -whole : whole;
}

Value round_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("round", arguments);
  const int64_t digits = take.whole("precision", 0);
  const Value* method = take.optional("method");
  take.done();
  return rounded(value, digits, method ? method->text() : "common");
}

Value attr_filter(Renderer&, const Value& value, Arguments& arguments) {
  Take take("attr", arguments);
  const std::string& name = take.needed("name").need_string("attr");
  take.done();
  // The filter looks at attributes alone, not at what is in the object.
  if (value.dict()) return bound(kDictMethods, value, name);
  return attribute(value, name);
}

const std::map<std::string_view, Filter> kFilters = {
    {"abs", abs_filter},
    {"attr", attr_filter},
    {"batch", batch_filter},
    {"capitalize", change_filter<capitalized>},
    {"count", length_filter},
    {"d", default_filter},
    {"default", default_filter},
    {"dictsort", dictsort_filter},
    {"e", change_filter<escaped>},
    {"escape", change_filter<escaped>},
    {"first", edge_filter<true>},
    {"float", float_filter},
    {"indent", indent_filter},
    {"int", int_filter},
    {"items", items_filter},
    {"join", join_filter},
    {"last", edge_filter<false>},
    {"length", length_filter},
    {"list", list_filter},
    {"lower", change_filter<lower>},
    {"map", map_filter},
    {"max", extreme_filter<1>},
    {"min", extreme_filter<-1>},
    {"reject", choose_filter<false, false>},
    {"rejectattr", choose_filter<true, false>},
    {"replace", replace_filter},
    {"reverse", reverse_filter},
    {"round", round_filter},
    {"safe", string_filter},
    {"select", choose_filter<false, true>},
    {"selectattr", choose_filter<true, true>},
    {"sort", sort_filter},
    {"string", string_filter},
    {"sum", sum_filter},
    {"title", change_filter<title_words>},
    {"tojson", tojson_filter},
    {"trim", trim_filter},
    {"unique", unique_filter},
    {"upper", change_filter<upper>},
};

// ---- tests
// ---------------------------------------------------------------------------------------
using Test = bool (*)(Renderer&, const Value&, Arguments&);

const Value& only(Arguments& arguments) {
  NATSLM_CHECK(arguments.positional.size() == 1, "a test needs one argument");
  return arguments.positional[0];
}

bool is_iterable(const Value& v) {
  return v.string() || v.list() || v.dict() || v.is_undefined();
}

const std::map<std::string_view, Test> kTests = {
    {"boolean", [](Renderer&, const Value& v, Arguments&) { return v.boolean() != nullptr; }},
    {"callable", [](Renderer&, const Value& v, Arguments&) { return v.callable() != nullptr; }},
    {"defined", [](Renderer&, const Value& v, Arguments&) { return !v.is_undefined(); }},
    {"divisibleby",
     [](Renderer&, const Value& v, Arguments& a) {
       const int64_t by = only(a).whole_number("divisibleby");
       NATSLM_CHECK(by != 0, "division by zero");
       return by == -1 || v.whole_number("divisibleby") % by == 0;
     }},
    {"even", [](Renderer&, const Value& v, Arguments&) { return v.whole_number("even") % 2 == 0; }},
    {"false", [](Renderer&, const Value& v, Arguments&) { return v.boolean() && !*v.boolean(); }},
    {"filter",
     [](Renderer&, const Value& v, Arguments&) { return v.string() && is_filter(*v.string()); }},
    {"float", [](Renderer&, const Value& v, Arguments&) { return v.real() != nullptr; }},
    {"in", [](Renderer&, const Value& v, Arguments& a) { return contains(only(a), v); }},
    {"integer", [](Renderer&, const Value& v, Arguments&) { return v.integer() != nullptr; }},
    {"iterable", [](Renderer&, const Value& v, Arguments&) { return is_iterable(v); }},
    {"lower",
     [](Renderer&, const Value& v, Arguments&) {
       return v.text() == lower(v.text()) && v.text() != upper(v.text());
     }},
    {"mapping", [](Renderer&, const Value& v, Arguments&) { return v.dict() != nullptr; }},
    {"none", [](Renderer&, const Value& v, Arguments&) { return v.is_none(); }},
    {"number", [](Renderer&, const Value& v, Arguments&) { return v.is_number(); }},
    {"odd", [](Renderer&, const Value& v, Arguments&) { return v.whole_number("odd") % 2 != 0; }},
    {"sameas",
     [](Renderer&, const Value& v, Arguments& a) {
       return v.type_name() == only(a).type_name() && equal(v, only(a));
     }},
    {"sequence", [](Renderer&, const Value& v, Arguments&) { return is_iterable(v); }},
    {"string", [](Renderer&, const Value& v, Arguments&) { return v.string() != nullptr; }},
    {"test",
     [](Renderer&, const Value& v, Arguments&) { return v.string() && is_test(*v.string()); }},
    {"true", [](Renderer&, const Value& v, Arguments&) { return v.boolean() && *v.boolean(); }},
    {"undefined", [](Renderer&, const Value& v, Arguments&) { return v.is_undefined(); }},
    {"upper",
     [](Renderer&, const Value& v, Arguments&) {
       return v.text() == upper(v.text()) && v.text() != lower(v.text());
     }},
};

// Tests that are comparisons.
const std::map<std::string_view, std::string_view> kComparisons = {
    {"==", "=="}, {"eq", "=="}, {"equalto", "=="},    {"!=", "!="}, {"ne", "!="},
    {">", ">"},   {"gt", ">"},  {"greaterthan", ">"}, {">=", ">="}, {"ge", ">="},
    {"<", "<"},   {"lt", "<"},  {"lessthan", "<"},    {"<=", "<="}, {"le", "<="}};

}  // namespace

bool is_filter(std::string_view name) {
  return kFilters.contains(name);
}

bool is_test(std::string_view name) {
  return kTests.contains(name) || kComparisons.contains(name);
}

Value apply_filter(Renderer& renderer, const std::string& name, const Value& value,
                   Arguments& arguments) {
  return kFilters.at(name)(renderer, value, arguments);
}

bool apply_test(Renderer& renderer, const std::string& name, const Value& value,
                Arguments& arguments) {
  if (const auto test = kTests.find(name); test != kTests.end()) {
    return test->second(renderer, value, arguments);
  }
  const std::string_view operation = kComparisons.at(name);
  if (operation == "==") return equal(value, only(arguments));
  if (operation == "!=") return !equal(value, only(arguments));
  const int order = compare(value, only(arguments));
  return operation == ">"    ? order > 0
         : operation == ">=" ? order >= 0
         : operation == "<"  ? order < 0
                             : order <= 0;
}

Value attribute(const Value& object, const std::string& name) {
  if (object.undefined()) fail("\"", object.undefined()->name, "\" is undefined");
  if (name.starts_with("__")) return Value::undefined(name);
  if (object.dict()) {
    // What Python's dict has as an attribute comes before what it holds.
    if (kDictMethods.contains(name)) return bound(kDictMethods, object, name);
    const Value* found = object.dict()->find(std::string_view(name));
    return found ? *found : Value::undefined(name);
  }
  if (object.string()) return bound(kTextMethods, object, name);
  if (object.list()) return bound(kListMethods, object, name);
  if (object.loop()) return loop_member(*object.loop(), object, name);
  if (object.space()) {
    const Value* found = object.space()->members.find(std::string_view(name));
    return found ? *found : Value::undefined(name);
  }
  return Value::undefined(name);
}

Value subscript(const Value& object, const Value& key) {
  if (object.undefined()) fail("\"", object.undefined()->name, "\" is undefined");
  if (object.dict()) {
    const Value* found = object.dict()->find(key);
    if (found) return *found;
    return key.string() && kDictMethods.contains(*key.string())
               ? bound(kDictMethods, object, *key.string())
               : Value::undefined(key.text());
  }
  const bool place = key.integer() || key.boolean();
  if ((object.list() || object.string()) && place) {
    std::vector<size_t> offsets;
    if (object.string()) offsets = character_offsets(*object.string());
    const auto size =
        static_cast<int64_t>(object.string() ? offsets.size() - 1 : object.list()->items.size());
    int64_t at = key.whole_number("");
    if (at < 0) at += size;
    if (at < 0 || at >= size) return Value::undefined("item " + key.text());
    if (object.list()) return object.list()->items[at];
    return object.string()->substr(offsets[at], offsets[at + 1] - offsets[at]);
  }
  return key.string() ? attribute(object, *key.string()) : Value::undefined(key.text());
}

Value call(Renderer& renderer, const Value& function, Arguments& arguments) {
  if (function.undefined()) fail("\"", function.undefined()->name, "\" is undefined");
  NATSLM_CHECK(function.callable(), "a ", function.type_name(), " cannot be called");
  return function.callable()->call(renderer, arguments);
}

std::vector<Value> iterate(const Value& value) {
  if (value.list()) return value.list()->items;
  std::vector<Value> items;
  if (value.dict()) {
    for (const auto& [key, one] : value.dict()->items()) items.push_back(key);
  } else if (value.string()) {
    for_each_character(*value.string(), [&](const CodePoint&, std::string_view bytes) {
      items.emplace_back(bytes);
    });
  } else {
    NATSLM_CHECK(value.is_undefined(), "a ", value.type_name(), " has no items");
  }
  return items;
}

bool contains(const Value& container, const Value& item) {
  if (container.string()) {
    return container.string()->find(item.need_string("in")) != std::string::npos;
  }
  if (container.dict()) return container.dict()->find(item) != nullptr;
  NATSLM_CHECK(container.list() || container.is_undefined(), "a ", container.type_name(),
               " holds no items");
  return container.list() && std::ranges::any_of(container.list()->items, [&](const Value& one) {
           return equal(one, item);
         });
}

Scope global_functions() {
  Scope scope;
  const auto add = [&](const char* name, std::function<Value(Renderer&, Arguments&)> function) {
    scope.set(name, Callable{name, std::move(function)});
  };
  add("range", range_function);
  add("dict", [](Renderer&, Arguments& arguments) -> Value { return dict_of(arguments); });
  add("namespace", [](Renderer&, Arguments& arguments) -> Value {
    return std::make_shared<Namespace>(Namespace{dict_of(arguments)});
  });
  add("raise_exception", [](Renderer&, Arguments& arguments) -> Value {
    throw Refused(arguments.positional.empty() ? "" : arguments.positional[0].text());
  });
  add("strftime_now", [](Renderer& renderer, Arguments& arguments) -> Value {
    Take take("strftime_now", arguments);
    const std::string format = take.needed("format").need_string("strftime_now");
    take.done();
    return formatted_time(format, renderer.now());
  });
  return scope;
}

}  // namespace natslm::data::jinja
