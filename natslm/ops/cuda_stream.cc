// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/cuda_stream.h"

#include <c10/cuda/CUDAStream.h>

namespace natslm::ops {

CUstream_st* current_stream(const c10::Device& device) {
  return c10::cuda::getCurrentCUDAStream(device.index());
}

}  // namespace natslm::ops
