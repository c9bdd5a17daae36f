// The index of a sharded model, beside the files that an undamaged one names.
// SPDX-License-Identifier: Apache-2.0
#include <filesystem>
#include <fstream>

#include "natslm/base/weight_files.h"
#include "tests/fuzz/one_line_error.h"
#include "tests/support/scratch_folder.h"

namespace natslm {
namespace {

struct Folder : test::ScratchFolder {
  Folder() : ScratchFolder(test::memory_folder()) {
    for (const char* tensor : {"a", "b"}) {
      const SafetensorsWriter::Tensor one{tensor, WeightType::kU8, {0}};
      SafetensorsWriter(path() / shard_name(*tensor - 'a', 2), {&one, 1}).commit();
    }
  }
  std::filesystem::path index() const { return path() / "model.safetensors.index.json"; }
};

}  // namespace
}  // namespace natslm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const natslm::Folder folder;
  std::ofstream(folder.index(), std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  natslm::works_or_throws_one_line([] { natslm::WeightFiles::open(folder.index()); });
  return 0;
}
