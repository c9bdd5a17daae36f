// Attributes, methods and functions, with the meaning of Jinja 3.1 in the form that `transformers`
// sets up (raise_exception and strftime_now are there). SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>

#include "natslm/base/error.h"
#include "natslm/data/jinja/arguments.h"
#include "natslm/data/jinja/renderer.h"
#include "natslm/data/jinja/text.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data::jinja {
namespace {

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

std::string formatted_time(const std::string& format, std::time_t now) {
  if (format.empty()) return "";
  std::tm local{};
  localtime_r(&now, &local);
  std::string text(format.size() * 16 + 64, '\0');
  text.resize(std::strftime(text.data(), text.size(), format.c_str(), &local));
  return text;
}

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

}  // namespace

Value dict_items(const Dict& dict) {
  List items;
  for (const auto& [key, value] : dict.items()) items.items.emplace_back(List{{key, value}, true});
  return items;
}

Value dict_method(const Value& object, const std::string& name) {
  return bound(kDictMethods, object, name);
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
