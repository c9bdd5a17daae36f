// SPDX-License-Identifier: Apache-2.0
#include <sstream>

#include "natslm/kernels/cuda/check.h"
#include "tests/support/device_memory.h"

namespace natslm::test {
namespace {

class GpuMemory : public Memory {
 public:
  GpuMemory() { NATSLM_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  // No checks here and in release(): a device that broke refuses these too, and the first error
  // is the one to report.
  ~GpuMemory() override { cudaStreamDestroy(stream_); }
  void* allocate(size_t bytes) override {
    void* memory = nullptr;
    NATSLM_CUDA(cudaMalloc(&memory, bytes));
    return memory;
  }
  void release(void* memory) override { cudaFree(memory); }
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
};

}  // namespace

std::unique_ptr<Memory> gpu_memory() {
  return std::make_unique<GpuMemory>();
}

std::string describe_gpu() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no: ") + cudaGetErrorString(status);
  if (count == 0) return "no: no GPU on this machine";
  cudaDeviceProp device;
  NATSLM_CUDA(cudaGetDeviceProperties(&device, 0));
  int driver = 0, runtime = 0;
  NATSLM_CUDA(cudaDriverGetVersion(&driver));
  NATSLM_CUDA(cudaRuntimeGetVersion(&runtime));
  std::ostringstream text;
  text << device.name << ", compute capability " << device.major << "." << device.minor << ", "
       << device.multiProcessorCount << " multiprocessors, " << (device.totalGlobalMem >> 20)
       << " MiB, driver for CUDA " << driver / 1000 << "." << driver % 1000 / 10 << ", runtime "
       << runtime / 1000 << "." << runtime % 1000 / 10;
  return text.str();
}

}  // namespace natslm::test
