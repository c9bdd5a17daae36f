// nats-lm eval: a command a task (eval/tasks.h), each in its own file.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/command.h"
#include "natslm/cli/eval_run.h"

namespace natslm::cli {

void add_eval(CLI::App& app, Context& context) {
  CLI::App& eval = *app.add_subcommand("eval", "measure quality through the real evicting cache");
  eval.require_subcommand(1);
  add_eval_ppl(eval, context);
  add_eval_repeat(eval, context);
  add_eval_facts(eval, context);
}

}  // namespace natslm::cli
