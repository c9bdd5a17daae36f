// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/repeat.h"

#include <utility>

#include "natslm/base/error.h"

namespace natslm::eval {

RepeatTask repeat_task(const data::RecallTasks& tasks, int32_t context, int32_t samples) {
  NATSLM_CHECK(samples >= 1, samples, " repeated passages are not possible: give 1 or more");
  RepeatTask task;
  for (int64_t number = 0; number < samples; ++number) {
    data::RepeatedPassage passage = tasks.repeated_passage(context, number);
    task.windows.push_back({number, 0, std::ssize(passage.tokens), passage.first});
    task.texts.push_back(std::move(passage.tokens));
  }
  return task;
}

PerplexityResult repeat(models::Model& model, std::unique_ptr<cache::Policy> policy,
                        const RepeatTask& task, const PerplexityOptions& options,
                        const Progress& progress) {
  PerplexityOptions settings = options;
  settings.context = static_cast<int32_t>(task.texts.at(0).size());
  return score_windows(model, std::move(policy), task.texts, task.windows, settings, progress);
}

}  // namespace natslm::eval
