// What training needs of CUDA beyond tensors. device_cuda.cc has it; in a build without CUDA,
// device_none.cc says so.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>

namespace natslm::train {

// Throws Error saying why this build or machine has no GPU to train on. Also lets LibTorch take
// cuDNN's dense attention before its other ones: it takes 0.6 times FlashAttention-2's time on an
// H200.
void prepare_cuda();

// Kernel launches recorded once and repeated with one call.
class LaunchGraph {
 public:
  virtual ~LaunchGraph() = default;
  virtual void replay() = 0;  // on the current stream
};

// Calls `launch`, which must queue work on the current stream (not the default one) and wait for
// nothing; nothing runs until replay(). Tensors it makes stay where they are as long as the graph
// lives. Throws c10::Error if something in it cannot be recorded.
std::unique_ptr<LaunchGraph> record_launches(const std::function<void()>& launch);

// Most bytes of tensors that a device ever held since the last reset.
int64_t peak_device_bytes(c10::Device device);
void reset_peak_device_bytes(c10::Device device);

}  // namespace natslm::train
