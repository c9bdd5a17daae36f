// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/json_file.h"

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm::models {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr uint64_t kMostBytes = 10'000'000;
// Parsing takes no stack for a level, but printing a value does.
constexpr int kDeepest = 100;
// An ordered object looks a name up one field after the other: 60,000 took minutes.
constexpr int kMostFields = 4'000;

}  // namespace

Json parse_small_json(std::string_view text) {
  std::vector<std::set<std::string>> open;  // names of each object that has begun
  int fields = 0;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
    using Event = Json::parse_event_t;
    NATSLM_CHECK(depth < kDeepest, "nests more than ", kDeepest, " levels deep");
    if (event == Event::object_start) open.emplace_back();
    if (event == Event::object_end) open.pop_back();
    if (event == Event::key) {
      const auto& name = value.get_ref<const std::string&>();
      NATSLM_CHECK(++fields <= kMostFields, "has more than ", kMostFields, " fields");
      NATSLM_CHECK(open.back().insert(name).second, "the field ", in_quotes(name),
                   " is given twice");
    }
    return true;
  };
  Json json = Json::parse(text, watch, /*allow_exceptions=*/false);
  NATSLM_CHECK(!json.is_discarded(), "not valid JSON; the file is damaged");
  return json;
}

Json read_json_file(const fs::path& file) {
  std::error_code unreadable;
  const auto size = fs::file_size(file, unreadable);
  NATSLM_CHECK(unreadable || size <= kMostBytes, file.string(), ": has ", size,
               " bytes, expected at most ", kMostBytes);
  const std::string text = read_file(file);
  try {
    return parse_small_json(text);
  } catch (const Error& error) {
    fail(file.string(), ": ", error.what());
  }
}

}  // namespace natslm::models
