// The stream that LibTorch works on, for kernels that know no Torch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

struct CUstream_st;

namespace natslm::ops {

// This thread's current stream of a GPU. Asks LibTorch's registry of devices, so that no CUDA
// header or library is needed where this is compiled.
inline CUstream_st* current_stream(c10::Device device) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  return static_cast<CUstream_st*>(stream.native_handle());
}

}  // namespace natslm::ops
