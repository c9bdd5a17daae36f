// The arguments of a function, method, filter or test. Internal to data/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/data/jinja/value.h"

namespace natslm::data::jinja {

// Takes the arguments of one call by place or name.
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

}  // namespace natslm::data::jinja
