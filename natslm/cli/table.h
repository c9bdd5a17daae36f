// A table as aligned plain text: numbers to the right, words to the left.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace natslm::cli {

class Table {
 public:
  explicit Table(std::vector<std::string> header) : header_(std::move(header)) {}
  // One cell a column.
  void add(std::vector<std::string> row);
  // Header, a rule and the rows, each line ended by a newline.
  std::string text() const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
};

// Numbers as people read them.
std::string fixed(double value, int digits);        // 3.14
std::string percent(double share, int digits = 1);  // 0.123 -> "12.3 %"
std::string bytes(int64_t count);                   // 1536 -> "1.5 KiB"
std::string duration(double seconds);               // 75 -> "1 min 15 s"

}  // namespace natslm::cli
