// The index of a sharded model, beside the files that an undamaged one names.
// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "natslm/base/weight_files.h"
#include "tests/fuzz/one_line_error.h"

namespace natslm {
namespace {

namespace fs = std::filesystem;

class Folder {
 public:
  Folder() {
    // In memory where there is such a folder: several times as fast.
    const fs::path memory = "/dev/shm";
    const fs::path parent = fs::is_directory(memory) ? memory : fs::temp_directory_path();
    std::string name = (parent / "natslm-index-XXXXXX").string();
    NATSLM_CHECK(::mkdtemp(name.data()), "no temporary folder");
    path_ = name;
    for (const char* tensor : {"a", "b"}) {
      const SafetensorsWriter::Tensor one{tensor, WeightType::kU8, {0}};
      SafetensorsWriter(path_ / shard_name(*tensor - 'a', 2), {&one, 1}).commit();
    }
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  fs::path index() const { return path_ / "model.safetensors.index.json"; }

 private:
  fs::path path_;
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
