// nats-lm eval facts: planted facts, asked for at the end of a long text.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "natslm/cli/eval_run.h"
#include "natslm/cli/interrupt.h"
#include "natslm/cli/lifetimes_view.h"
#include "natslm/eval/facts.h"
#include "natslm/eval/tasks.h"

namespace natslm::cli {
namespace {

struct Options : EvalOptions {
  eval::FactsOptions facts;
  bool show_answers = false;
};

// One line, whatever the question has.
std::string line_of(const eval::Answered& answered) {
  std::string question = answered.question.text;
  question.erase(0, question.find_first_not_of('\n'));
  for (size_t at = 0; (at = question.find('\n', at)) != std::string::npos;)
    question.replace(at, 1, " / ");
  return std::string(answered.recalled ? "right  " : "wrong  ") + question + " [" +
         answered.question.answer + "]: " + printable(answered.given);
}

void eval_facts(const Options& o, Context& context) {
  const InterruptGuard guard;
  EvalRun run(o, context);
  eval::FactsOptions options = o.facts;
  options.context = run.protocol().context;
  const eval::Streams streams = run.streams();
  const data::RecallTasks tasks(run.tokenizer(), run.source(streams), o.seed);
  const eval::FactsTask task = eval::facts_task(tasks, options);
  const auto asked = std::ssize(task.front().questions);
  const int64_t questions = std::ssize(task) * asked;
  const eval::Streams texts = eval::budget_texts(task);
  // Policies' shares refer to the text as it is when they are asked.
  eval::PerplexityOptions protocol = run.protocol();
  protocol.context = static_cast<int32_t>(texts.front().size());

  run.compare(
      {"recalled"}, questions, texts, protocol,
      [&](models::Model& model, std::unique_ptr<cache::Policy> policy,
          const eval::Progress& progress) {
        eval::FactsHooks hooks{.on_progress = progress};
        if (o.show_answers) {
          hooks.on_answer = [&](const eval::Answered& answered) { run.print(line_of(answered)); };
        }
        const auto result =
            eval::recall_facts(model, std::move(policy), run.tokenizer(), task, protocol, hooks);
        EvalResult row;
        row.policy = result.policy;
        row.scores = {percent(result.score) + " +- " + fixed(100 * result.error, 1)};
        row.json = {{"task", "facts"},
                    {"score", result.score},
                    {"n", result.questions},
                    {"stderr", result.error},
                    {"tokens", result.keys.tokens}};
        row.kv_end = row.kv_end_full = result.keys.kv_end;
        row.kv_mean = result.keys.kv_mean;
        row.demoted = result.keys.demoted;
        row.kv_peak_over_cap = result.keys.kv_peak_over_cap;
        row.kv_bytes_mean = result.keys.kv_bytes_mean;
        row.kv_bytes_peak = result.keys.kv_bytes_peak;
        row.batch_bytes_peak = result.batch_bytes_peak;
        row.prefill_chunk = result.prefill_chunk;
        row.tokens = result.keys.tokens;
        row.seconds = result.seconds;
        return row;
      });

  const std::string notes =
      "\nRecalled (higher is better, +- one standard error): " + std::to_string(questions) +
      (questions == 1 ? " question" : " questions") + ", " + std::to_string(asked) + " of " +
      std::to_string(options.facts) + " facts in each of " + std::to_string(task.size()) +
      (task.size() == 1 ? " text" : " texts") + " of " + std::to_string(options.context) +
      " tokens, a text read anew for each; bytes of keys and values held by one sequence, " +
      run.cache_dtype() + ".\n" + run.budget_note();
  std::fputs(notes.c_str(), stdout);
}

}  // namespace

void add_eval_facts(CLI::App& eval, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(eval, "facts", std::string(eval::task("facts").summary),
                                  [o, &context] { eval_facts(*o, context); });
  add_eval_options(command, *o);
  command.add_option("--samples", o->facts.samples, "texts with facts planted in them")
      ->check(CLI::Range(1, 1 << 20));
  command.add_option("--facts", o->facts.facts, "facts planted in a text")
      ->check(CLI::Range(1, 32));
  command
      .add_option("--ask", o->facts.ask,
                  "questions a text, each asked alone; 0: 4, or all facts if they are fewer")
      ->check(CLI::Range(0, 32));
  command.add_flag("--show-answers", o->show_answers, "print each question and what was answered");
}

}  // namespace natslm::cli
