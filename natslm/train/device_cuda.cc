// SPDX-License-Identifier: Apache-2.0
#include <ATen/Context.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "natslm/base/error.h"
#include "natslm/train/device.h"

namespace natslm::train {
namespace {

class Recorded : public LaunchGraph {
 public:
  explicit Recorded(const std::function<void()>& launch) {
    c10::cuda::getCurrentCUDAStream().synchronize();
    // The graph's tensors come from a pool of its own: what the steps before it left in the common
    // one would be held a second time.
    c10::cuda::CUDACachingAllocator::emptyCache();
    graph_.capture_begin();
    try {
      launch();
    } catch (...) {
      // The stream must not stay in recording; that this fails too adds nothing.
      try {
        graph_.capture_end();
      } catch (...) {
      }
      throw;
    }
    graph_.capture_end();
  }
  void replay() override { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
};

}  // namespace

void prepare_cuda() {
  NATSLM_CHECK(c10::cuda::device_count() > 0,
               "--device is cuda; no GPU was found that this build can use (CUDA 13: a driver of "
               "version 580 or later)");
  using enum at::SDPBackend;
  std::vector<int64_t> order;
  for (const at::SDPBackend backend :
       {cudnn_attention, flash_attention, efficient_attention, math, overrideable})
    order.push_back(static_cast<int64_t>(backend));
  at::globalContext().setSDPPriorityOrder(order);
}

std::unique_ptr<LaunchGraph> record_launches(const std::function<void()>& launch) {
  return std::make_unique<Recorded>(launch);
}

int64_t peak_device_bytes(c10::Device device) {
  using c10::CachingAllocator::StatType;
  return c10::cuda::CUDACachingAllocator::getDeviceStats(device.index())
      .allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)]
      .peak;
}

void reset_peak_device_bytes(c10::Device device) {
  c10::cuda::CUDACachingAllocator::resetPeakStats(device.index());
}

}  // namespace natslm::train
