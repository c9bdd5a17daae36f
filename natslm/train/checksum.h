// A 64-bit checksum against damage (not against forgery): any change of a single bit changes it,
// and other damage goes unnoticed about once in 2^64. Costs nothing beside reading the bytes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace natslm::train {

uint64_t checksum(std::string_view bytes);
// Of a file's bytes, as 16 hexadecimal digits. Throws Error if it cannot be read.
std::string file_checksum(const std::filesystem::path& path);
std::string hex(uint64_t value);

}  // namespace natslm::train
