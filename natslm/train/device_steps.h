// Steps on a device by the model's written-out training pass: one sequence of kernels from the
// tokens to the new weights, recorded once as a CUDA graph. What differs from step to step (tokens,
// learning rate, number of the step, lambda) is device memory. The host fills the next batch and
// sends it on a stream of its own while the step before runs, and reads that step's numbers
// afterwards: nobody waits for anybody as long as the host is the faster one.
//
// With a model on the CPU, and float32 products, the same steps run in place: for tests.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "natslm/data/dataset.h"
#include "natslm/models/model.h"
#include "natslm/train/options.h"
#include "natslm/train/steps.h"

namespace natslm::train {

struct DeviceStepOptions {
  at::ScalarType products = at::kBFloat16;  // type of the matrix products
  bool graph = true;                        // false: every kernel is launched anew in each step
  float bias = 0;                           // added to all Sliding logits; for benchmarks
};

// The model must be on its device and stay there; its parameters' gradients become the pass's.
std::unique_ptr<Steps> make_device_steps(models::Model& model, const data::TokenDataset& dataset,
                                         const Options& options, const DeviceStepOptions& how = {});

}  // namespace natslm::train
