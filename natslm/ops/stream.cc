// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/stream.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace natslm::ops {

CUstream_st* current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<CUstream_st*>(guard.getStream(device).native_handle());
}

}  // namespace natslm::ops
