// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/facts.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/engine/engine.h"

namespace natslm::eval {
namespace {

bool letter_or_digit(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         (static_cast<uint8_t>(c) & 0x80) != 0;
}

std::vector<int32_t> prompt_of(const data::PlantedFacts& text,
                               const data::PlantedFacts::Question& question) {
  std::vector<int32_t> prompt = text.context;
  prompt.insert(prompt.end(), question.tokens.begin(), question.tokens.end());
  return prompt;
}

}  // namespace

FactsTask facts_task(const data::RecallTasks& tasks, const FactsOptions& options) {
  NATSLM_CHECK(options.samples >= 1, options.samples,
               " texts with facts are not possible: give 1 or more");
  NATSLM_CHECK(options.ask >= 0 && options.ask <= options.facts, options.ask,
               " questions cannot be asked about ", options.facts,
               " facts: give as many or fewer, or 0");
  const int32_t ask = options.ask > 0 ? options.ask : std::min(4, options.facts);
  FactsTask task;
  for (int64_t number = 0; number < options.samples; ++number) {
    task.push_back(tasks.planted_facts(options.facts, options.context - kMostAnswerTokens, number));
    task.back().questions.resize(ask);
  }
  return task;
}

Streams budget_texts(const FactsTask& task) {
  Streams texts;
  for (const data::PlantedFacts& text : task) {
    for (const auto& question : text.questions) texts.push_back(prompt_of(text, question));
  }
  NATSLM_CHECK(!texts.empty(), "there is no text with facts to set a budget on");
  std::vector<size_t> sizes;
  for (const auto& text : texts) sizes.push_back(text.size());
  const auto median = sizes.begin() + std::ssize(sizes) / 2;
  std::ranges::nth_element(sizes, median);
  std::erase_if(texts, [&](const auto& text) { return text.size() < *median; });
  for (auto& text : texts) text.resize(*median);
  return texts;
}

bool recalled(std::string_view given, std::string_view answer) {
  given.remove_prefix(std::min(given.find_first_not_of(' '), given.size()));
  return given.starts_with(answer) &&
         (given.size() == answer.size() || !letter_or_digit(given[answer.size()]));
}

FactsResult recall_facts(models::Model& model, std::unique_ptr<cache::Policy> policy,
                         const data::Tokenizer& tokenizer, const FactsTask& task,
                         const PerplexityOptions& options, const FactsHooks& hooks) {
  FactsResult result;
  result.policy = policy->spec();
  engine::Engine engine(model, std::move(policy), &tokenizer, engine_options(model, options));
  std::vector<double> right(task.size()), asked(task.size());
  std::vector<engine::KeyUse> uses;
  const auto begin = std::chrono::steady_clock::now();
  const auto submit = [&](int64_t number, const data::PlantedFacts::Question& question) {
    engine::GenerationRequest request;
    request.prompt = prompt_of(task[number], question);
    request.options.max_new_tokens = kMostAnswerTokens;
    request.options.stop = {"\n"};
    request.on_done = [&, number](const engine::Generated& generated) {
      const bool good = recalled(generated.text, question.answer);
      right[number] += good ? 1 : 0;
      asked[number] += 1;
      uses.push_back(generated.use);
      if (hooks.on_answer) hooks.on_answer({number, question, generated.text, good});
    };
    engine.submit(std::move(request));
  };
  // A few ahead of the engine: prompts are copies of the contexts.
  int64_t number = 0;
  const auto refill = [&] {
    for (; number < std::ssize(task) && engine.waiting() < 64; ++number) {
      for (const auto& question : task[number].questions) submit(number, question);
    }
  };
  for (refill(); engine.step(); refill()) {
    if (hooks.on_progress) hooks.on_progress(std::ssize(uses));
  }
  result.questions = std::ssize(uses);
  NATSLM_CHECK(result.questions > 0, "no question was asked: give one text with facts or more");
  for (const double count : right) result.score += count;
  result.score /= static_cast<double>(result.questions);
  result.error = standard_error(right, asked);
  result.keys = means_of(uses);
  result.batch_bytes_peak = engine.peak().held_bytes;
  result.prefill_chunk = engine.prefill_chunk();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace natslm::eval
