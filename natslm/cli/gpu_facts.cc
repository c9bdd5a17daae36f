// The GPU's part of device.h.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <fstream>
#include <string>

#include "natslm/cli/device.h"

namespace natslm::cli {

namespace {

std::string kernel_driver() {
  std::ifstream version("/proc/driver/nvidia/version");
  std::string word;
  // "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build ..."
  while (version >> word) {
    if (word.find_first_not_of("0123456789.") == std::string::npos &&
        word.find('.') != std::string::npos) {
      return word;
    }
  }
  return "";
}

}  // namespace

GpuFacts gpu_facts() {
  GpuFacts facts;
  cudaRuntimeGetVersion(&facts.runtime);
  if (cudaDriverGetVersion(&facts.driver) != cudaSuccess || facts.driver == 0) {
    facts.problem = "there is no NVIDIA driver on this machine";
    return facts;
  }
  if (facts.driver < facts.runtime) return facts;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    facts.problem = std::string("no GPU can be used: ") +
                    (status == cudaSuccess ? "there is none" : cudaGetErrorString(status));
    return facts;
  }
  cudaDeviceProp device;
  if (const cudaError_t failed = cudaGetDeviceProperties(&device, 0); failed != cudaSuccess) {
    facts.problem = std::string("the GPU does not answer: ") + cudaGetErrorString(failed);
    return facts;
  }
  facts.name = device.name;
  facts.major = device.major;
  facts.minor = device.minor;
  facts.multiprocessors = device.multiProcessorCount;
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess) {
    facts.free_memory = static_cast<int64_t>(free);
    facts.memory = static_cast<int64_t>(total);
  }
  facts.kernel_driver = kernel_driver();
  return facts;
}

// Through the driver's management library, which is there wherever the driver is.
int gpu_clock_mhz() {
  constexpr int kMultiprocessorClock = 1;  // NVML_CLOCK_SM
  using Init = int (*)();
  using GetHandle = int (*)(const char*, void**);
  using GetClock = int (*)(void*, int, unsigned*);
  static void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  if (!library) return 0;
  const auto init = reinterpret_cast<Init>(dlsym(library, "nvmlInit_v2"));
  const auto get_handle =
      reinterpret_cast<GetHandle>(dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2"));
  const auto get_clock = reinterpret_cast<GetClock>(dlsym(library, "nvmlDeviceGetClockInfo"));
  char bus[32] = "";
  void* handle = nullptr;
  unsigned clock = 0;
  const bool known = init && get_handle && get_clock &&
                     cudaDeviceGetPCIBusId(bus, sizeof bus, 0) == cudaSuccess && init() == 0 &&
                     get_handle(bus, &handle) == 0 &&
                     get_clock(handle, kMultiprocessorClock, &clock) == 0;
  return known ? static_cast<int>(clock) : 0;
}

}  // namespace natslm::cli
