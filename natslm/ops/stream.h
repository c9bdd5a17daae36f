// The stream of a GPU that LibTorch works on, for kernels that are launched beside its own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

struct CUstream_st;

namespace natslm::ops {

// Throws Error in a build without CUDA.
CUstream_st* current_stream(const c10::Device& device);

}  // namespace natslm::ops
