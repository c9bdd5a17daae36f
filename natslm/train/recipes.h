// How to train each preset of models/: options that were found by measurement (docs/training.md).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "natslm/train/options.h"

namespace natslm::train {

// Throws Error listing what there is.
Options recipe(std::string_view preset);

}  // namespace natslm::train
