// JSON of small files that somebody else may have written: config.json and its like. Whatever is
// handed out is safe to print, copy and look fields up in: few levels, few fields, none twice.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace natslm::models {

// Throws Error (without a file's name) for text that is no JSON, a name given twice in one object,
// more than 100 levels, and more than 4,000 fields in all.
nlohmann::ordered_json parse_small_json(std::string_view text);
// The same of a file of at most 10,000,000 bytes. Errors begin with its name.
nlohmann::ordered_json read_json_file(const std::filesystem::path& file);

}  // namespace natslm::models
