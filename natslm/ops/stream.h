// The stream that work on a device is to be queued on. Needs no CUDA header.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

struct CUstream_st;

namespace natslm::ops {

// The current stream of a CUDA device, as LibTorch has it. Throws c10::Error without CUDA.
CUstream_st* current_stream(c10::Device device);

}  // namespace natslm::ops
