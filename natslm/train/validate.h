// Perplexity of held-out windows by the training pass with argmax roles: what the model would
// predict if dead keys were gone, without the cost of a real cache. (Evaluation proper goes through
// the cache.)
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "natslm/data/dataset.h"
#include "natslm/models/model.h"
#include "natslm/train/trainer.h"

namespace natslm::train {

// Over at most `windows` windows (0: all), spread evenly, `batch` at a time. Throws Error if the
// text is shorter than one window.
Validation validate(models::Model& model, const data::TokenDataset& dataset, int64_t context,
                    int64_t batch, int64_t windows);

}  // namespace natslm::train
