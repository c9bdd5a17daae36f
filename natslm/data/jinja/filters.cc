// Filters and tests, with the meaning of Jinja 3.1 in the form that `transformers` sets up (tojson
// is json.dumps). SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>

#include "natslm/base/error.h"
#include "natslm/data/jinja/arguments.h"
#include "natslm/data/jinja/renderer.h"
#include "natslm/data/jinja/text.h"

namespace natslm::data::jinja {
namespace {

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
    style.item.pop_back();  // no space at the end of a line
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
  if (value.dict()) return dict_method(value, name);
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

}  // namespace natslm::data::jinja
