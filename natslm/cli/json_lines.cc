// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/json_lines.h"

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "natslm/base/error.h"

namespace natslm::cli {

JsonLines::JsonLines(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "w")) {
  NATSLM_CHECK(file_, "--json ", path, " cannot be written: ", std::strerror(errno));
}

void JsonLines::write(const nlohmann::ordered_json& object) {
  // Text from a model need not be whole UTF-8: what is not becomes U+FFFD.
  const std::string line =
      object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  const bool written = std::fwrite(line.data(), 1, line.size(), file_.get()) == line.size() &&
                       std::fflush(file_.get()) == 0;
  NATSLM_CHECK(written, "--json ", path_, " cannot be written: ", std::strerror(errno));
}

}  // namespace natslm::cli
