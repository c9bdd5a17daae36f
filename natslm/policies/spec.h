// A policy as a user writes it: "name" or "name:option=value,option=value".
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace natslm::policies {

// One setting of a policy, for help texts and for checking a spec.
struct OptionDoc {
  std::string_view name;
  std::string_view fallback;  // the default, as text
  std::string_view summary;   // with unit, range and what 0 means
};

class Spec {
 public:
  // Throws Error for text that is not of the form above.
  explicit Spec(std::string_view text);

  const std::string& name() const { return name_; }
  bool has(std::string_view option) const;
  // Throws Error naming an option that is not among `allowed`, and listing those.
  void check_options(std::span<const OptionDoc> allowed) const;
  // Value of an option or the fallback. Throws Error for what is no number or lies outside
  // [lowest, highest].
  double number(std::string_view option, double fallback, double lowest, double highest) const;
  int32_t integer(std::string_view option, int32_t fallback, int32_t lowest, int32_t highest) const;
  void set(std::string_view option, std::string value);

  std::string text() const;

 private:
  const std::string* find(std::string_view option) const;
  std::string name_;
  std::vector<std::pair<std::string, std::string>> options_;  // as written, in order
};

// A number as short as it can be written: "0.1", "252".
std::string shortest(double value);

}  // namespace natslm::policies
