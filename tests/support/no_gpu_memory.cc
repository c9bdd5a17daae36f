// The GPU's part of device_memory.h in a build without CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "tests/support/device_memory.h"

namespace natslm::test {

std::unique_ptr<Memory> gpu_memory() {
  fail("this build has no CUDA code");
}

std::string describe_gpu() {
  return "no: this build has no CUDA code; build the preset cuda-release";
}

}  // namespace natslm::test
