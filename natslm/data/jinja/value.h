// The values of a Jinja template, with the meaning that Python gives them: what is true, what is
// equal, how a list prints. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace natslm::data::jinja {

class Value;
class Renderer;

struct List {
  std::vector<Value> items;
  bool tuple = false;  // prints with parentheses
};

// Keeps the order in which keys came.
class Dict {
 public:
  const Value* find(const Value& key) const;  // nullptr: not there
  const Value* find(std::string_view key) const;
  void set(const Value& key, Value value);
  const std::vector<std::pair<Value, Value>>& items() const { return items_; }

 private:
  static std::string index_key(const Value& key);  // throws Error for a list or a dict

  std::vector<std::pair<Value, Value>> items_;
  std::unordered_map<std::string, size_t> index_;
};

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// A function, a method bound to its object, or a macro.
struct Callable {
  std::string name;
  std::function<Value(Renderer&, Arguments&)> call;
};

// What an expression without a value gives: prints as nothing, is false, and anything else is an
// Error with this name.
struct Undefined {
  std::string name;
};

struct None {};

// namespace(...): the one object a template may change.
struct Namespace {
  Dict members;
};

// The variable `loop`.
struct LoopState {
  const std::vector<Value>* items = nullptr;
  size_t index = 0;  // from 0
  size_t depth = 1;  // of loops around, this one included
};

class Value {
 public:
  using Kinds = std::variant<Undefined, None, bool, int64_t, double,
                             std::shared_ptr<const std::string>, std::shared_ptr<const List>,
                             std::shared_ptr<const Dict>, std::shared_ptr<const Callable>,
                             std::shared_ptr<Namespace>, std::shared_ptr<LoopState>>;

  Value() : kind_(None{}) {}
  Value(bool value) : kind_(value) {}
  Value(int64_t value) : kind_(value) {}
  Value(double value) : kind_(value) {}
  Value(std::string text) : kind_(std::make_shared<const std::string>(std::move(text))) {}
  Value(std::string_view text) : Value(std::string(text)) {}
  Value(const char* text) : Value(std::string(text)) {}
  Value(List list) : kind_(std::make_shared<const List>(std::move(list))) {}
  Value(Dict dict) : kind_(std::make_shared<const Dict>(std::move(dict))) {}
  Value(Callable callable) : kind_(std::make_shared<const Callable>(std::move(callable))) {}
  Value(std::shared_ptr<Namespace> space) : kind_(std::move(space)) {}
  Value(std::shared_ptr<LoopState> loop) : kind_(std::move(loop)) {}
  static Value undefined(std::string name) {
    Value value;
    value.kind_ = Undefined{std::move(name)};
    return value;
  }
  static Value of(const nlohmann::ordered_json& json);

  bool is_undefined() const { return std::holds_alternative<Undefined>(kind_); }
  bool is_none() const { return std::holds_alternative<None>(kind_); }
  const Undefined* undefined() const { return std::get_if<Undefined>(&kind_); }
  const bool* boolean() const { return std::get_if<bool>(&kind_); }
  const int64_t* integer() const { return std::get_if<int64_t>(&kind_); }
  const double* real() const { return std::get_if<double>(&kind_); }
  const std::string* string() const { return object<const std::string>(); }
  const List* list() const { return object<const List>(); }
  const Dict* dict() const { return object<const Dict>(); }
  const Callable* callable() const { return object<const Callable>(); }
  Namespace* space() const { return object<Namespace>(); }
  LoopState* loop() const { return object<LoopState>(); }

  bool is_number() const { return boolean() || integer() || real(); }
  // True and False count as 1 and 0. Throws Error for anything but a number.
  double number() const;
  // The same without a fraction; `what` names the value in the message.
  int64_t whole_number(std::string_view what) const;
  const std::string& need_string(std::string_view what) const;  // throws Error

  bool truth() const;
  std::string type_name() const;  // "string", "list", ...
  std::string text() const;       // str(x)
  std::string repr() const;       // as it prints inside a list

 private:
  template <class T>
  T* object() const {
    const auto* pointer = std::get_if<std::shared_ptr<T>>(&kind_);
    return pointer ? pointer->get() : nullptr;
  }
  void print(std::string& result, bool inside, int depth) const;

  Kinds kind_;
};

bool equal(const Value& a, const Value& b);
// Negative, 0, positive; throws Error for values without an order.
int compare(const Value& a, const Value& b);
// json.dumps(x, ensure_ascii=..., indent=..., separators=..., sort_keys=...).
struct JsonStyle {
  bool ascii = false, sorted = false;
  int indent = -1;  // -1: one line
  std::string item = ", ", key = ": ";
};
std::string to_json(const Value& value, const JsonStyle& style);
// repr() of Python's float.
std::string real_text(double value);

// ---- text as a sequence of characters ----
size_t length_of(std::string_view text);
// Byte offsets of all characters and of the end.
std::vector<size_t> character_offsets(std::string_view text);

}  // namespace natslm::data::jinja
