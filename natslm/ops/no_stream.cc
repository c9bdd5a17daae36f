// A build without CUDA has no streams.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/ops/stream.h"

namespace natslm::ops {

CUstream_st* current_stream(const c10::Device& device) {
  fail("device ", device.str(), ": this build has no CUDA code; build the preset cuda-release");
}

}  // namespace natslm::ops
