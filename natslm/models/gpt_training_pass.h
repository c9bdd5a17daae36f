// The training pass of gpt.h; see training_pass.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "natslm/models/gpt.h"
#include "natslm/models/training_pass.h"

namespace natslm::models {

// Config, weights and rotary must outlive the pass. `parameters` names the weights in the order in
// which the pass gives their gradients. Throws Error for a type or head size it cannot take.
std::unique_ptr<TrainingPass> make_gpt_training_pass(const Config& config,
                                                     const GptWeights& weights,
                                                     const Rotary& rotary,
                                                     const NamedTensors& parameters,
                                                     at::ScalarType type);

}  // namespace natslm::models
