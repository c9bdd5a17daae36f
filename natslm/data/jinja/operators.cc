// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/jinja/operators.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "natslm/base/error.h"

namespace natslm::data::jinja {
namespace {

[[noreturn]] void wrong_operands(const Value& a, std::string_view operation, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (value->undefined()) fail("\"", value->undefined()->name, "\" is undefined");
  }
  fail("a ", a.type_name(), " ", operation, " a ", b.type_name(), " has no meaning");
}

Value repeated(Renderer& renderer, const Value& value, int64_t times) {
  const auto count = static_cast<size_t>(std::max<int64_t>(times, 0));
  const size_t size = value.string() ? value.string()->size() : value.list()->items.size();
  if (size > 0 && count > 0) {
    NATSLM_CHECK(count < Renderer::kMostWork / size, "a value repeated ", count,
                 " times is too long");
    renderer.charge(size * count);
  }
  if (value.string()) {
    std::string text;
    for (size_t i = 0; size > 0 && i < count; ++i) text += *value.string();
    return text;
  }
  List list{{}, value.list()->tuple};
  for (size_t i = 0; size > 0 && i < count; ++i) {
    list.items.insert(list.items.end(), value.list()->items.begin(), value.list()->items.end());
  }
  return list;
}

Value whole_power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  for (int64_t i = 0; i < exponent; ++i) {
    NATSLM_CHECK(!__builtin_mul_overflow(result, base, &result), "a power is too large");
    if (result == 0 || result == 1) break;
    if (result == -1 && base == -1) return int64_t{exponent % 2 == 0 ? 1 : -1};
  }
  return result;
}

}  // namespace

Value arithmetic(Renderer& renderer, const std::string& operation, const Value& a, const Value& b) {
  if (operation == "+" && a.string() && b.string()) {
    renderer.charge(a.string()->size() + b.string()->size());
    return *a.string() + *b.string();
  }
  if (operation == "+" && a.list() && b.list() && a.list()->tuple == b.list()->tuple) {
    List sum = *a.list();
    renderer.charge(sum.items.size() + b.list()->items.size());
    sum.items.insert(sum.items.end(), b.list()->items.begin(), b.list()->items.end());
    return sum;
  }
  if (operation == "*" && (a.string() || a.list()) && (b.integer() || b.boolean())) {
    return repeated(renderer, a, b.whole_number("a factor"));
  }
  if (operation == "*" && (b.string() || b.list()) && (a.integer() || a.boolean())) {
    return repeated(renderer, b, a.whole_number("a factor"));
  }
  if (!a.is_number() || !b.is_number()) wrong_operands(a, operation, b);
  const bool division = operation == "/" || operation == "//" || operation == "%";
  NATSLM_CHECK(!division || b.number() != 0, "division by zero");
  if (a.real() || b.real() || operation == "/") {
    const double x = a.number(), y = b.number();
    if (operation == "+") return x + y;
    if (operation == "-") return x - y;
    if (operation == "*") return x * y;
    if (operation == "/") return x / y;
    if (operation == "//") return std::floor(x / y);
    if (operation == "%") return x - y * std::floor(x / y);
    return std::pow(x, y);
  }
  const int64_t x = a.whole_number(""), y = b.whole_number("");
  int64_t result = 0;
  bool overflow = false;
  if (operation == "+") {
    overflow = __builtin_add_overflow(x, y, &result);
  } else if (operation == "-") {
    overflow = __builtin_sub_overflow(x, y, &result);
  } else if (operation == "*") {
    overflow = __builtin_mul_overflow(x, y, &result);
  } else if (operation == "**") {
    if (y < 0) return std::pow(static_cast<double>(x), static_cast<double>(y));
    return whole_power(x, y);
  } else {
    overflow = y == -1 && x == std::numeric_limits<int64_t>::min();
    if (!overflow) {
      const int64_t quotient = x / y - ((x % y != 0) && ((x < 0) != (y < 0)));
      result = operation == "//" ? quotient : x - quotient * y;
    }
  }
  NATSLM_CHECK(!overflow, "a whole number is too large");
  return result;
}

bool compared(const std::string& operation, const Value& a, const Value& b) {
  if (operation == "==") return equal(a, b);
  if (operation == "!=") return !equal(a, b);
  if (operation == "in") return contains(b, a);
  if (operation == "not in") return !contains(b, a);
  if (a.undefined() || b.undefined()) wrong_operands(a, operation, b);
  const int order = compare(a, b);
  return operation == "<"    ? order < 0
         : operation == "<=" ? order <= 0
         : operation == ">"  ? order > 0
                             : order >= 0;
}

Value sliced(Renderer& r, const Value& object, std::optional<int64_t> from,
             std::optional<int64_t> to, int64_t step) {
  NATSLM_CHECK(object.string() || object.list(), "a ", object.type_name(),
               object.undefined() ? " (\"" + object.undefined()->name + "\")" : "",
               " has no slices");
  NATSLM_CHECK(step != 0, "a slice cannot have step 0");
  std::vector<size_t> offsets;
  if (object.string()) offsets = character_offsets(*object.string());
  const auto size =
      static_cast<int64_t>(object.string() ? offsets.size() - 1 : object.list()->items.size());
  r.charge(static_cast<size_t>(size));
  const int64_t lowest = step > 0 ? 0 : -1, highest = step > 0 ? size : size - 1;
  const auto place = [&](std::optional<int64_t> bound, int64_t otherwise) {
    if (!bound) return otherwise;
    const int64_t at = *bound < 0 ? std::max(*bound, -size - 1) + size : *bound;
    return std::clamp(at, lowest, highest);
  };
  const int64_t first = place(from, step > 0 ? lowest : highest);
  const int64_t last = place(to, step > 0 ? highest : lowest);
  step = std::clamp(step, -size - 1, size + 1);
  std::string text;
  List list{{}, object.list() && object.list()->tuple};
  for (int64_t i = first; step > 0 ? i < last : i > last; i += step) {
    if (object.string()) {
      text.append(*object.string(), offsets[i], offsets[i + 1] - offsets[i]);
    } else {
      list.items.push_back(object.list()->items[i]);
    }
  }
  return object.string() ? Value(text) : Value(list);
}

}  // namespace natslm::data::jinja
