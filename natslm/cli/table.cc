// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string_view>

#include "natslm/base/error.h"

namespace natslm::cli {

namespace {

// Columns a UTF-8 text takes; wide characters are not told apart, tables hold none.
int columns_of(std::string_view text) {
  return static_cast<int>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

bool looks_like_number(std::string_view cell) {
  if (cell.empty() || cell == "-") return true;
  const size_t first = cell.find_first_not_of("+-");
  return first != std::string_view::npos && cell[first] >= '0' && cell[first] <= '9';
}

std::string formatted(const char* format, double value) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), format, value);
  return buffer.data();
}

}  // namespace

void Table::add(std::vector<std::string> row) {
  NATSLM_ASSERT(row.size() == header_.size());
  rows_.push_back(std::move(row));
}

std::string Table::text() const {
  const size_t columns = header_.size();
  std::vector<int> width(columns);
  std::vector<char> right(columns, 1);
  for (size_t c = 0; c < columns; ++c) {
    width[c] = columns_of(header_[c]);
    for (const auto& row : rows_) {
      width[c] = std::max(width[c], columns_of(row[c]));
      right[c] = right[c] && looks_like_number(row[c]);
    }
  }
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string text;
    for (size_t c = 0; c < columns; ++c) {
      const std::string padding(width[c] - columns_of(cells[c]), ' ');
      text += c == 0 ? "" : "  ";
      text += right[c] ? padding + cells[c] : cells[c] + padding;
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + "\n";
  };
  line(header_);
  std::vector<std::string> rule;
  for (size_t c = 0; c < columns; ++c) rule.push_back(std::string(width[c], '-'));
  line(rule);
  for (const auto& row : rows_) line(row);
  return out;
}

std::string fixed(double value, int digits) {
  return formatted(("%." + std::to_string(digits) + "f").c_str(), value);
}

std::string percent(double share, int digits) {
  return fixed(100 * share, digits) + " %";
}

std::string bytes(int64_t count) {
  constexpr std::array kUnits{"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(count);
  size_t unit = 0;
  while (std::abs(value) >= 1024 && unit + 1 < kUnits.size()) value /= 1024, ++unit;
  return fixed(value, unit == 0 ? 0 : 1) + " " + kUnits[unit];
}

std::string duration(double seconds) {
  if (seconds < 10) return fixed(seconds, 1) + " s";
  const int64_t whole = std::llround(seconds);
  if (whole < 60) return std::to_string(whole) + " s";
  if (whole < 3600) return std::to_string(whole / 60) + " min " + std::to_string(whole % 60) + " s";
  return std::to_string(whole / 3600) + " h " + std::to_string(whole % 3600 / 60) + " min";
}

}  // namespace natslm::cli
