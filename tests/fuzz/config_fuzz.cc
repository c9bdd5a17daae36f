// config.json of a model's folder, ours and Hugging Face's.
// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "natslm/models/models.h"
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
    std::string name = (parent / "natslm-config-XXXXXX").string();
    NATSLM_CHECK(::mkdtemp(name.data()), "no temporary folder");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace
}  // namespace natslm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const natslm::Folder folder;
  std::ofstream(folder.path() / "config.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  natslm::works_or_throws_one_line([] { natslm::models::load_config(folder.path()); });
  return 0;
}
