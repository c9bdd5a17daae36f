// JSON for the readers of data/: parsing that refuses doubled names, and values that know where
// they stand, so that an error names the member. Internal to data/. SPDX-License-Identifier:
// Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/tokenizer.h"

namespace natslm::data {

using Json = nlohmann::json;

// Throws Error for text that is no JSON, for a name given twice in an object (the parser would drop
// one silently; in a vocabulary that is a damaged file), and beyond 100 levels of nesting.
Json parse_json(std::string_view text);
// The same, members in the order of the text.
nlohmann::ordered_json parse_ordered_json(std::string_view text);

// Control characters as \n and \x1F: names and tokens in messages of one line.
std::string one_line(std::string_view text);

// A JSON value and its name in the file ("model.vocab"), for messages.
class Field {
 public:
  Field(const Json& value, std::string name) : value_(&value), name_(std::move(name)) {}

  const Json& value() const { return *value_; }
  const std::string& name() const { return name_; }
  bool is_null() const { return value_->is_null(); }

  // Null when the member is missing.
  Field operator[](const char* member) const {
    static const Json kNothing;
    need(value_->is_object(), "must be an object");
    const auto found = value_->find(member);
    return {found == value_->end() ? kNothing : *found,
            name_.empty() ? member : name_ + "." + member};
  }
  Field item(size_t index) const {
    return {(*value_)[index], name_ + "[" + std::to_string(index) + "]"};
  }
  size_t items() const {
    need(value_->is_array(), "must be a list");
    return value_->size();
  }
  std::string text() const {
    need(value_->is_string(), "must be a string");
    return value_->get<std::string>();
  }
  bool flag(bool otherwise) const {
    if (is_null()) return otherwise;
    need(value_->is_boolean(), "must be true or false");
    return value_->get<bool>();
  }
  double number() const {
    need(value_->is_number(), "must be a number");
    return value_->get<double>();
  }
  int32_t id() const {
    need(value_->is_number_integer() && value_->get<int64_t>() >= 0 &&
             value_->get<int64_t>() < kMostTokens,
         "must be a token id, 0 .. 16777215");
    return value_->get<int32_t>();
  }
  // The value must be one that changes nothing.
  void must_be(std::initializer_list<Json> allowed) const {
    const bool fine = std::ranges::any_of(allowed, [&](const Json& one) { return one == *value_; });
    need(fine, "is not supported");
  }
  // No member but these.
  void only(std::initializer_list<std::string_view> members) const {
    need(value_->is_object(), "must be an object");
    for (const auto& [member, value] : value_->items()) {
      const bool known = std::ranges::find(members, member) != members.end();
      NATSLM_CHECK(known, "member ", name_, ".", member, " is not known");
    }
  }
  void need(bool condition, std::string_view what) const {
    if (condition) return;
    std::string shown = value_->dump(-1, ' ', false, Json::error_handler_t::replace);
    if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
    fail("member ", name_, " = ", shown, " ", what);
  }

 private:
  const Json* value_;
  std::string name_;
};

}  // namespace natslm::data
