// SPDX-License-Identifier: Apache-2.0
#include <cstddef>

#include "natslm/base/safetensors.h"
#include "tests/fuzz/one_line_error.h"
#include "tests/support/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const natslm::MemoryFile file;
  file.set({reinterpret_cast<const char*>(data), size});
  natslm::works_or_throws_one_line([] {
    const natslm::MappedSafetensors weights(file.path());
    // Touches every byte of every tensor.
    volatile unsigned char last = 0;
    for (const auto& entry : weights.entries())
      for (const std::byte b : entry.bytes) last = std::to_integer<unsigned char>(b);
    static_cast<void>(last);
  });
  return 0;
}
