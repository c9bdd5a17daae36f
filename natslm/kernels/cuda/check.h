// CUDA calls that throw. A message has the call, the error's name and the place.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "natslm/base/error.h"

// Also after a launch: NATSLM_CUDA(cudaGetLastError()).
#define NATSLM_CUDA(call)                                                                  \
  do {                                                                                     \
    const cudaError_t natslm_status = (call);                                              \
    if (natslm_status != cudaSuccess) [[unlikely]]                                         \
      ::natslm::fail(#call, " failed: ", cudaGetErrorName(natslm_status), " (",            \
                     cudaGetErrorString(natslm_status), ") at ", __FILE__, ":", __LINE__); \
  } while (false)
