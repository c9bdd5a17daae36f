// Launches that begin while the one before them in the stream ends (programmatic dependent launch):
// blocks are set up, and do what depends on nothing, before they wait. In a CUDA graph, too.
//
// A kernel started by launch_dependent calls await_launch_before() in every thread before it
// touches what earlier launches of the chain read or write; so a chain is finished when its last
// kernel is. The first kernel of a chain is launched plainly: it begins after all that is before
// it. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "natslm/kernels/cuda/check.h"

namespace natslm::kernels::cuda {

// Allows the next launch to begin once every block has come here or ended.
__device__ inline void admit_launch_behind() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the launch before has ended and its writes are visible.
__device__ inline void await_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// On a device whose code in this library knows the two (cmake/cuda.cmake: 9.0; what is compiled
// from PTX of 8.0 does not), else a plain launch.
inline bool can_launch_dependent() {
  int device = 0, major = 0, minor = 0;
  NATSLM_CUDA(cudaGetDevice(&device));
  NATSLM_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  NATSLM_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 blocks, unsigned threads,
                      size_t shared_bytes, CUstream_st* stream, const Arguments&... arguments) {
  cudaLaunchAttribute dependent = {};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = can_launch_dependent() ? 1 : 0;
  NATSLM_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace natslm::kernels::cuda
