// One rendering: variables in nested scopes, the text so far, and limits, so that a hostile
// template ends in an error. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <ctime>
#include <deque>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/data/jinja/value.h"

namespace natslm::data::jinja {

// What a template says by raise_exception().
class Refused : public Error {
 public:
  using Error::Error;
};

struct Scope {
  const Scope* outer = nullptr;
  std::vector<std::pair<std::string, Value>> variables;
  void set(const std::string& name, Value value);
  const Value* find(std::string_view name) const;  // in this scope only
};

class Renderer {
 public:
  static constexpr size_t kMostWork = size_t{1} << 26;  // bytes put together, and 16 a step
  static constexpr int kDeepestCalls = 40;

  Renderer(Scope globals, std::time_t now);

  Value variable(const std::string& name) const;
  void set(const std::string& name, Value value) { scope_->set(name, std::move(value)); }
  const Scope* scope() const { return scope_; }
  void write(std::string_view text);
  // Counts work that was or will be done; throws Error beyond the limit.
  void charge(size_t work) {
    work_ += work;
    NATSLM_CHECK(work_ < kMostWork, "it works without end: more than ", kMostWork / 16, " steps");
  }
  void step() { charge(16); }
  std::time_t now() const { return now_; }

  // Runs `body` in a new scope inside `outer`, and what it writes is the result.
  std::string captured(const Scope* outer, const std::function<void()>& body);
  // Runs `body` in a new scope inside the present one.
  void nested(const std::function<void()>& body);
  void forget_variables() { scope_->variables.clear(); }

  int line = 1;   // of the statement that runs
  int calls = 0;  // of macros, one inside the other
  int loops = 0;  // one inside the other

 private:
  std::deque<Scope> scopes_;  // all that were made: a macro may outlive the one it was made in
  Scope* scope_;
  std::string* out_ = nullptr;
  size_t work_ = 0;
  std::time_t now_;
};

// ---- filters.cc ----
bool is_filter(std::string_view name);
bool is_test(std::string_view name);
Value apply_filter(Renderer& renderer, const std::string& name, const Value& value,
                   Arguments& arguments);
bool apply_test(Renderer& renderer, const std::string& name, const Value& value,
                Arguments& arguments);
// ---- methods.cc ----
Value attribute(const Value& object, const std::string& name);  // object.name
Value dict_method(const Value& object, const std::string& name);
Value dict_items(const Dict& dict);                      // pairs
Value subscript(const Value& object, const Value& key);  // object[key]
Value call(Renderer& renderer, const Value& function, Arguments& arguments);
// The values that a loop goes over; throws Error for what is no list.
std::vector<Value> iterate(const Value& value);
bool contains(const Value& container, const Value& item);
// range, namespace, dict, raise_exception, strftime_now
Scope global_functions();

}  // namespace natslm::data::jinja
