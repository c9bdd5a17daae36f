// Machine-readable results: a file with one JSON object a line.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace natslm::cli {

class JsonLines {
 public:
  // Starts the file anew. Throws Error if it cannot be written.
  explicit JsonLines(const std::string& path);
  // One line, on disk (as far as the system is concerned) when this returns. Throws Error if it is
  // not.
  void write(const nlohmann::ordered_json& object);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace natslm::cli
