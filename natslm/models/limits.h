// Sizes that no model may exceed. Readers of configs need them before check() does: they make
// tables of every layer, and derive sizes from others.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace natslm::models {

inline constexpr int32_t kMostLayers = 4096, kMostWidth = 1 << 20;

}  // namespace natslm::models
