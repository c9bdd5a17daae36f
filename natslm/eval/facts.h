// Recall of facts: sentences planted in a long text are asked for at its end, one question at a
// time, answered greedily through the evicting cache. The policy meets the question only after it
// has read, and evicted from, the text. Facts and questions are data/recall_tasks.h's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/recall_tasks.h"
#include "natslm/data/tokenizer.h"
#include "natslm/eval/perplexity.h"
#include "natslm/eval/runs.h"

namespace natslm::eval {

inline constexpr int32_t kMostAnswerTokens = 12;

struct FactsOptions {
  int32_t context = 0;   // tokens of text, question and answer together; 0: the model's context
  int32_t facts = 8;     // planted in a text, 1 to 32
  int32_t ask = 0;       // questions a text; 0: 4, or all facts if they are fewer
  int32_t samples = 20;  // texts
};

using FactsTask = std::vector<data::PlantedFacts>;  // with the questions that are asked only

// Throws Error for impossible options and as RecallTasks::planted_facts does. context must be set.
FactsTask facts_task(const data::RecallTasks& tasks, const FactsOptions& options);

// Texts to set budgets on: contexts with a question each, of one length: the median's of all
// (longer ones are cut, shorter ones left out). A question can be a good part of a short context.
Streams budget_texts(const FactsTask& task);

// Whether the text that a model gave begins with the answer, spaces aside, and goes on with neither
// letter nor digit.
bool recalled(std::string_view given, std::string_view answer);

struct FactsResult {
  std::string policy;  // its spec
  double score = 0;    // share of the questions whose answer was recalled
  double error = 0;    // its standard error; questions on one text count as one draw
  int64_t questions = 0;
  KeyMeans keys;  // over the texts as read once a question, question and answer included
  int64_t batch_bytes_peak = 0;
  int32_t prefill_chunk = 0;  // after the policy's limit
  double seconds = 0;
};

// A question that was answered.
struct Answered {
  int64_t text = 0;  // number in the task
  const data::PlantedFacts::Question& question;
  std::string_view given;  // at most kMostAnswerTokens, up to the end of the line
  bool recalled = false;
};

struct FactsHooks {
  std::function<void(const Answered&)> on_answer;      // may be empty
  std::function<void(int64_t questions)> on_progress;  // after each step; may throw to stop
};

// Of `options`, chunk, batch and type of the cache count. A chat model, too, is asked to go on with
// the text: no chat template is put around it.
FactsResult recall_facts(models::Model& model, std::unique_ptr<cache::Policy> policy,
                         const data::Tokenizer& tokenizer, const FactsTask& task,
                         const PerplexityOptions& options = {}, const FactsHooks& hooks = {});

}  // namespace natslm::eval
