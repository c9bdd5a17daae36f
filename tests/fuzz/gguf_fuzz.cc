// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "natslm/base/gguf.h"
#include "natslm/kernels/dequantize.h"
#include "tests/fuzz/one_line_error.h"
#include "tests/support/memory_file.h"

namespace natslm {
namespace {

// Asks for every value in every way: each asks for what is there, or throws.
void read_metadata(const GgufFile& file) {
  for (const auto& [key, value] : file.metadata()) {
    const std::string_view k = key;
    works_or_throws_one_line([&] { file.get_bool(k); });
    works_or_throws_one_line([&] { file.get_u32(k); });
    works_or_throws_one_line([&] { file.get_i64(k); });
    works_or_throws_one_line([&] { file.get_f32(k); });
    works_or_throws_one_line([&] { file.get_string(k); });
    works_or_throws_one_line([&] { file.get_strings(k); });
    works_or_throws_one_line([&] { file.get_i32s(k); });
    works_or_throws_one_line([&] { file.get_f32s(k); });
    works_or_throws_one_line([&] { file.get_bools(k); });
    works_or_throws_one_line([&] { file.get_arrays(k); });
  }
}

void read_tensors(const GgufFile& file) {
  std::vector<float> values;
  for (const GgufFile::Tensor& t : file.tensors()) {
    if (!facts(t.type).real) continue;
    const auto elements =
        static_cast<int64_t>(t.bytes.size()) / facts(t.type).bytes * facts(t.type).block;
    values.resize(elements);
    const kernels::Dequantize params{t.type, t.bytes.data(), elements, values.data()};
    kernels::cpu::run({&params, 1}, serial());
  }
}

}  // namespace
}  // namespace natslm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const natslm::MemoryFile file;
  file.set({reinterpret_cast<const char*>(data), size});
  natslm::works_or_throws_one_line([] {
    const natslm::GgufFile gguf = natslm::GgufFile::open(file.path());
    natslm::read_metadata(gguf);
    natslm::read_tensors(gguf);
  });
  return 0;
}
