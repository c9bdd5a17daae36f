// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/json_field.h"

#include <cstdio>
#include <functional>
#include <unordered_set>
#include <vector>

namespace natslm::data {
namespace {

// The parser's own stack is on the heap, but printing and destroying values recurse.
constexpr int kDeepest = 100;

template <class AnyJson>
class Strictness {
 public:
  using Event = typename AnyJson::parse_event_t;
  bool operator()(int depth, Event event, AnyJson& value) {
    NATSLM_CHECK(depth < kDeepest, "the JSON is nested deeper than ", kDeepest, " levels");
    if (event == Event::object_start) open_.emplace_back();
    if (event == Event::object_end) open_.pop_back();
    if (event == Event::key) {
      const auto& name = value.template get_ref<const std::string&>();
      NATSLM_CHECK(open_.back().insert(name).second, "the member \"", name, "\" is given twice");
    }
    return true;
  }

 private:
  std::vector<std::unordered_set<std::string>> open_;
};

template <class AnyJson>
AnyJson parse(std::string_view text) {
  Strictness<AnyJson> strictness;
  try {
    return AnyJson::parse(text.begin(), text.end(), std::ref(strictness));
  } catch (const Json::parse_error& error) {
    fail("not valid JSON at byte ", error.byte, " of ", text.size(), "; truncated or damaged?");
  } catch (const Json::exception& error) {
    fail("not valid JSON: ", error.what());
  }
}

}  // namespace

std::string one_line(std::string_view text) {
  std::string line;
  for (const char c : text) {
    if (c == '\n') {
      line += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\x%02X", static_cast<unsigned char>(c));
      line += escape;
    } else {
      line += c;
    }
  }
  return line;
}

Json parse_json(std::string_view text) {
  return parse<Json>(text);
}

nlohmann::ordered_json parse_ordered_json(std::string_view text) {
  return parse<nlohmann::ordered_json>(text);
}

}  // namespace natslm::data
