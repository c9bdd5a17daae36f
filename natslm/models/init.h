// First weights as a pure function of (seed, parameter name, element): the same on every machine,
// whatever the order or the number of threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace natslm::models {

// A float32 tensor of independent N(0, deviation^2) numbers.
at::Tensor normal(at::IntArrayRef shape, double deviation, uint64_t seed, std::string_view name);

}  // namespace natslm::models
