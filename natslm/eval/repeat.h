// Verbatim memory: how well a model predicts a passage that it read before and is told to repeat,
// through the evicting cache. Passages and instructions are data/recall_tasks.h's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "natslm/data/recall_tasks.h"
#include "natslm/eval/perplexity.h"

namespace natslm::eval {

struct RepeatTask {
  Streams texts;                // each of the same length
  std::vector<Window> windows;  // one a text; only the repetition has scores
};

// `samples` texts of `context` tokens. Throws Error as RecallTasks::repeated_passage does, and for
// no sample.
RepeatTask repeat_task(const data::RecallTasks& tasks, int32_t context, int32_t samples);

// Perplexity of the repeated tokens alone. Of `options`, chunk, batch and type of the cache count.
PerplexityResult repeat(models::Model& model, std::unique_ptr<cache::Policy> policy,
                        const RepeatTask& task, const PerplexityOptions& options = {},
                        const Progress& progress = {});

}  // namespace natslm::eval
