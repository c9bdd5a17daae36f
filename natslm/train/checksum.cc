// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/checksum.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"

namespace natslm::train {

uint64_t checksum(std::string_view bytes) {
  // Four lanes, so that the multiplications overlap. Each step is a bijection of the lane for fixed
  // input and of the input for a fixed lane: one changed word always changes its lane's end.
  uint64_t lanes[4] = {1, 2, 3, 4};
  size_t at = 0;
  for (; at + 32 <= bytes.size(); at += 32) {
    uint64_t words[4];
    std::memcpy(words, bytes.data() + at, sizeof words);
    for (int i = 0; i < 4; ++i) lanes[i] = mix64(lanes[i] ^ words[i]);
  }
  uint64_t sum = mix64(bytes.size());
  for (const uint64_t lane : lanes) sum = mix64(sum ^ lane);
  for (; at < bytes.size(); ++at) sum = mix64(sum ^ static_cast<unsigned char>(bytes[at]));
  return sum;
}

std::string hex(uint64_t value) {
  std::string digits(16, '0');
  for (size_t i = 0; i < 16; ++i) digits[15 - i] = "0123456789abcdef"[(value >> (4 * i)) & 15];
  return digits;
}

std::string file_checksum(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  NATSLM_CHECK(file, "cannot open ", path.string(), ": ", std::strerror(errno));
  std::string block(size_t{1} << 20, '\0');
  uint64_t sum = 0;
  while (file.read(block.data(), std::ssize(block)), file.gcount() > 0)
    sum = mix64(sum ^ checksum({block.data(), static_cast<size_t>(file.gcount())}));
  NATSLM_CHECK(!file.bad(), "cannot read ", path.string(), ": ", std::strerror(errno));
  return hex(sum);
}

}  // namespace natslm::train
