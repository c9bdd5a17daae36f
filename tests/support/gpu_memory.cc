// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <map>
#include <sstream>
#include <vector>

#include "natslm/kernels/cuda/check.h"
#include "tests/support/device_memory.h"

namespace natslm::test {
namespace {

class GpuMemory : public Memory {
 public:
  GpuMemory() { NATSLM_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  // No checks here: a device that broke refuses these too, and the first error is the one to
  // report.
  ~GpuMemory() override {
    for (const auto& [size, blocks] : free_) {
      for (void* block : blocks) cudaFree(block);
    }
    cudaStreamDestroy(stream_);
  }
  // Blocks of powers of two that are used again: cudaMalloc and cudaFree take longer than most
  // tests.
  void* allocate(size_t bytes) override {
    const size_t size = std::bit_ceil(std::max<size_t>(bytes, 4096));
    std::vector<void*>& blocks = free_[size];
    void* memory = nullptr;
    if (blocks.empty()) {
      NATSLM_CUDA(cudaMalloc(&memory, size));
    } else {
      memory = blocks.back();
      blocks.pop_back();
    }
    size_of_[memory] = size;
    return memory;
  }
  void release(void* memory) override { free_[size_of_[memory]].push_back(memory); }
  void upload(void* to, const void* from, size_t bytes) override {
    NATSLM_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    finish();  // the source may be gone when the call returns
  }
  void download(void* to, const void* from, size_t bytes) override {
    NATSLM_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    finish();
  }
  void fill(void* to, uint8_t value, size_t bytes) override {
    NATSLM_CUDA(cudaMemsetAsync(to, value, bytes, stream_));
  }
  CUstream_st* stream() override { return stream_; }
  void finish() override { NATSLM_CUDA(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
  std::map<size_t, std::vector<void*>> free_;
  std::map<void*, size_t> size_of_;
};

}  // namespace

std::unique_ptr<Memory> gpu_memory() {
  return std::make_unique<GpuMemory>();
}

std::string describe_gpu() {
  int count = 0;
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no: there is no NVIDIA driver on this machine";
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no: ") + cudaGetErrorString(status);
  if (count == 0) return "no: no GPU on this machine";
  cudaDeviceProp device;
  NATSLM_CUDA(cudaGetDeviceProperties(&device, 0));
  NATSLM_CUDA(cudaRuntimeGetVersion(&runtime));
  std::ostringstream text;
  text << device.name << ", compute capability " << device.major << "." << device.minor << ", "
       << device.multiProcessorCount << " multiprocessors, " << (device.totalGlobalMem >> 20)
       << " MiB, driver for CUDA " << driver / 1000 << "." << driver % 1000 / 10 << ", runtime "
       << runtime / 1000 << "." << runtime % 1000 / 10;
  return text.str();
}

}  // namespace natslm::test
