// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/spec.h"

#include <charconv>
#include <cmath>

#include "natslm/base/error.h"

namespace natslm::policies {
namespace {

template <class Number>
Number parse(std::string_view policy, std::string_view option, const std::string& text,
             const char* what, Number lowest, Number highest) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  NATSLM_CHECK(whole && value >= lowest && value <= highest, "policy ", policy, ": ", option, "=",
               text, " is not ", what, " from ", shortest(static_cast<double>(lowest)), " to ",
               shortest(static_cast<double>(highest)));
  return value;
}

}  // namespace

std::string shortest(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

Spec::Spec(std::string_view text) {
  const size_t colon = text.find(':');
  name_ = text.substr(0, colon);
  NATSLM_CHECK(!name_.empty(), "policy \"", text,
               "\" has no name; write name or name:option=value,option=value");
  if (colon == std::string_view::npos) return;
  std::string_view rest = text.substr(colon + 1);
  while (true) {
    const size_t comma = rest.find(',');
    const std::string_view item = rest.substr(0, comma);
    const size_t equals = item.find('=');
    NATSLM_CHECK(equals != std::string_view::npos && equals > 0 && equals + 1 < item.size(),
                 "policy ", name_, ": \"", item, "\" is not option=value");
    const std::string_view option = item.substr(0, equals);
    NATSLM_CHECK(!has(option), "policy ", name_, ": ", option, " is given twice");
    options_.emplace_back(option, item.substr(equals + 1));
    if (comma == std::string_view::npos) return;
    rest.remove_prefix(comma + 1);
  }
}

const std::string* Spec::find(std::string_view option) const {
  for (const auto& [name, value] : options_) {
    if (name == option) return &value;
  }
  return nullptr;
}

bool Spec::has(std::string_view option) const {
  return find(option) != nullptr;
}

void Spec::check_options(std::span<const OptionDoc> allowed) const {
  std::vector<std::string_view> names;
  for (const OptionDoc& option : allowed) names.push_back(option.name);
  for (const auto& [option, value] : options_) {
    bool known = false;
    for (const std::string_view name : names) known = known || name == option;
    if (known) continue;
    NATSLM_CHECK(!names.empty(), "policy ", name_, " has no options; got ", option);
    fail("policy ", name_, " has no option ", option, "; it has ", list(names));
  }
}

double Spec::number(std::string_view option, double fallback, double lowest, double highest) const {
  const std::string* text = find(option);
  return text ? parse(name_, option, *text, "a number", lowest, highest) : fallback;
}

int32_t Spec::integer(std::string_view option, int32_t fallback, int32_t lowest,
                      int32_t highest) const {
  const std::string* text = find(option);
  return text ? parse(name_, option, *text, "a whole number", lowest, highest) : fallback;
}

void Spec::set(std::string_view option, std::string value) {
  for (auto& [name, old] : options_) {
    if (name == option) {
      old = std::move(value);
      return;
    }
  }
  options_.emplace_back(option, std::move(value));
}

std::string Spec::text() const {
  std::string text = name_;
  char separator = ':';
  for (const auto& [option, value] : options_) {
    text += separator;
    text += option + "=" + value;
    separator = ',';
  }
  return text;
}

}  // namespace natslm::policies
