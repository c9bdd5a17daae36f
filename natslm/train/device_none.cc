// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/train/device.h"

namespace natslm::train {
namespace {

[[noreturn]] void refuse() {
  fail("--device is cuda; this build has no CUDA code, build the preset cuda-release");
}

}  // namespace

void prepare_cuda() {
  refuse();
}

std::unique_ptr<LaunchGraph> record_launches(const std::function<void()>&) {
  refuse();
}

int64_t peak_device_bytes(c10::Device) {
  return 0;
}

void reset_peak_device_bytes(c10::Device) {}

}  // namespace natslm::train
