// Weights of a file, plain or quantised, into tensors: converted by all of LibTorch's threads, and
// the file's pages given back as they are done, so that loading needs little more memory than the
// model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <string>

#include "natslm/base/weight_files.h"

namespace natslm::models {

struct WeightTarget {
  std::string name;   // in the file
  at::Tensor tensor;  // float32 or bf16 of the shape it has there; any device, any strides
};

// Overwrites the tensors' values; no gradient is recorded. Throws Error, before anything is
// overwritten, for a name that the files lack, another shape (file, tensor, found and expected in
// the message), or a type that holds no real numbers. `files` must not have been written to.
void read_weights(const WeightFiles& files, std::span<const WeightTarget> targets);

// One of them as a new CPU tensor, float32 or bf16.
at::Tensor read_weight(const WeightFiles& files, const std::string& name,
                       at::ScalarType type = at::kFloat);

}  // namespace natslm::models
