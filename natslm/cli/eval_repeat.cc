// nats-lm eval repeat: perplexity of passages that a text asks to be repeated.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "natslm/cli/eval_run.h"
#include "natslm/cli/interrupt.h"
#include "natslm/eval/repeat.h"
#include "natslm/eval/tasks.h"

namespace natslm::cli {
namespace {

struct Options : EvalOptions {
  int32_t samples = 20;
};

void eval_repeat(const Options& o, Context& context) {
  const InterruptGuard guard;
  EvalRun run(o, context);
  const eval::PerplexityOptions& protocol = run.protocol();
  const eval::Streams streams = run.streams();
  const data::RecallTasks tasks(run.tokenizer(), run.source(streams), o.seed);
  const eval::RepeatTask task = eval::repeat_task(tasks, protocol.context, o.samples);
  int64_t to_score = 0;
  for (const eval::Window& window : task.windows) to_score += window.scored();

  run.compare(
      {"perplexity"}, to_score, task.texts, protocol,
      [&](models::Model& model, std::unique_ptr<cache::Policy> policy,
          const eval::Progress& progress) {
        const auto result = eval::repeat(model, std::move(policy), task, protocol, progress);
        EvalResult row;
        row.take_keys(result);
        row.policy = result.policy;
        row.tokens = int64_t{o.samples} * protocol.context;
        row.scores = {fixed(result.perplexity, result.perplexity < 1000 ? 3 : 0)};
        row.json = {{"task", "repeat"},       {"score", result.perplexity},
                    {"n", result.windows},    {"stderr", result.perplexity * result.nll_error},
                    {"nll", result.nll},      {"nll_stderr", result.nll_error},
                    {"tokens", result.tokens}};
        return row;
      });

  const std::string notes = "\nPerplexity (lower is better) of " + std::to_string(to_score) +
                            " repeated tokens, " + std::to_string(o.samples) +
                            (o.samples == 1 ? " passage" : " passages") +
                            ", each at the end of a window of " + std::to_string(protocol.context) +
                            " tokens; bytes of keys and values held by one sequence, " +
                            run.cache_dtype() + ".\n" + run.budget_note();
  std::fputs(notes.c_str(), stdout);
}

}  // namespace

void add_eval_repeat(CLI::App& eval, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(eval, "repeat", std::string(eval::task("repeat").summary),
                                  [o, &context] { eval_repeat(*o, context); });
  add_eval_options(command, *o);
  command.add_option("--samples", o->samples, "texts, each with a passage to repeat")
      ->check(CLI::Range(1, 1 << 20));
}

}  // namespace natslm::cli
