// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/model.h"

#include <c10/core/GradMode.h>

#include "natslm/base/error.h"
#include "natslm/models/training_pass.h"

namespace natslm::models {

Model::Model() = default;
Model::~Model() = default;

void Model::to(c10::Device device) {
  const c10::NoGradGuard no_grad;
  for (auto& [name, parameter] : parameters_) {
    parameter.mutable_grad() = at::Tensor();
    parameter.set_data(parameter.detach().to(device));
  }
}

c10::Device Model::device() const {
  return parameters_.empty() ? c10::Device(c10::kCPU) : parameters_.front().second.device();
}

std::unique_ptr<TrainingPass> Model::training_pass(at::ScalarType) {
  fail("the architecture '", config_.architecture, "' cannot be trained on a GPU yet");
}

at::Tensor Model::output(const at::Tensor&) const {
  fail("the architecture '", config_.architecture, "' cannot be fine-tuned");
}

void Model::add_adapters(int64_t, uint64_t) {
  fail("the architecture '", config_.architecture, "' has no place for adapters");
}

}  // namespace natslm::models
