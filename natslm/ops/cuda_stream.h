// The stream that GPU work of this thread goes to, as LibTorch keeps it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

struct CUstream_st;

namespace natslm::ops {

// Of a CUDA device. Throws c10::Error in a build without CUDA.
CUstream_st* current_stream(const c10::Device& device);

}  // namespace natslm::ops
