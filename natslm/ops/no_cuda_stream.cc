// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>

#include "natslm/ops/cuda_stream.h"

namespace natslm::ops {

CUstream_st* current_stream(const c10::Device& device) {
  TORCH_CHECK(false, "this build has no CUDA code, so it has no stream of ", device,
              "; build the preset cuda-release");
}

}  // namespace natslm::ops
