// The body and the launch of a Hopper kernel whose blocks stay on their multiprocessor: one
// warpgroup of which a single warp loads (the producer), and the consumer warpgroups that compute.
// Registers go where they are needed.
//
// Kernel: a struct with
//   Config    kThreads, kProducerRegisters, kConsumerRegisters, Arguments, Shared
//   Producer  {arguments, shared, lane} with run(), for all lanes of a warp
//   Consumer  (arguments, shared, number of the warpgroup) with run()
//   init_barriers(shared), for one thread
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/dependent_launch.cuh"
#include "natslm/kernels/sm90/hopper.cuh"

namespace natslm::kernels::sm90 {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::Config::kThreads, 1)
    warp_roles_kernel(const __grid_constant__ typename Kernel::Config::Arguments arguments) {
  using Config = typename Kernel::Config;
  extern __shared__ __align__(kSwizzleBytes) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(shared_bytes);
  // A broadcast: the compiler then knows the value to be the same in all lanes.
  const int32_t warp = __shfl_sync(~0u, static_cast<int32_t>(threadIdx.x) / kWarpThreads, 0);
  cuda::admit_launch_behind();
  if (threadIdx.x == 0) Kernel::init_barriers(shared);
  __syncthreads();
  cuda::await_launch_before();
  if (warp < kWarpgroupThreads / kWarpThreads) {
    shrink_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      const int32_t lane = threadIdx.x % kWarpThreads;
      typename Kernel::Producer{arguments, shared, lane}.run();
    }
  } else {
    grow_registers<Config::kConsumerRegisters>();
    typename Kernel::Consumer(arguments, shared, warp / 4 - 1).run();
  }
}

// One block per multiprocessor, or per item where there are fewer. Behind the launch before it in
// the stream (cuda/dependent_launch.cuh).
template <class Kernel>
void launch_warp_roles(const typename Kernel::Config::Arguments& arguments, int32_t items,
                       int multiprocessors, CUstream_st* stream) {
  using Config = typename Kernel::Config;
  constexpr size_t kSharedBytes = sizeof(typename Config::Shared);
  const auto kernel = warp_roles_kernel<Kernel>;
  NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kSharedBytes)));
  const int blocks = items < multiprocessors ? items : multiprocessors;
  cuda::launch_dependent(kernel, static_cast<unsigned>(blocks), Config::kThreads, kSharedBytes,
                         stream, arguments);
}

}  // namespace natslm::kernels::sm90
