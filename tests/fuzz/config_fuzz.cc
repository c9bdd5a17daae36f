// config.json of a model's folder, ours and Hugging Face's.
// SPDX-License-Identifier: Apache-2.0
#include <fstream>

#include "natslm/models/models.h"
#include "tests/fuzz/one_line_error.h"
#include "tests/support/scratch_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const natslm::test::ScratchFolder folder(natslm::test::memory_folder());
  std::ofstream(folder / "config.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  natslm::works_or_throws_one_line([] { natslm::models::load_config(folder.path()); });
  return 0;
}
