// The GPU's part of device.h in a build without CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/device.h"

namespace natslm::cli {

GpuFacts gpu_facts() {
  GpuFacts facts;
  facts.problem = "this build has no CUDA code; build the preset cuda-release (make cuda)";
  return facts;
}

int gpu_clock_mhz() {
  return 0;
}

}  // namespace natslm::cli
