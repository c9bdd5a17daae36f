// LibTorch's own threads as a ParallelFor, so that the kernels never make a second pool.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/base/parallel.h"

namespace natslm::ops {

ParallelFor torch_threads();

}  // namespace natslm::ops
