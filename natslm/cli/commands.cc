// The one table of commands. A new one: its declaration, its line, its file in CMakeLists.txt.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/command.h"

namespace natslm::cli {

void add_bench_attention(CLI::App& bench, Context& context);
void add_bench_decode(CLI::App& bench, Context& context);
void add_bench_prefill(CLI::App& bench, Context& context);
void add_bench_train(CLI::App& bench, Context& context);
void add_eval(CLI::App& app, Context& context);
void add_finetune(CLI::App& app, Context& context);
void add_generate(CLI::App& app, Context& context);
void add_info(CLI::App& app, Context& context);
void add_models(CLI::App& app, Context& context);
void add_policies(CLI::App& app, Context& context);
void add_roles(CLI::App& app, Context& context);
void add_train(CLI::App& app, Context& context);

void add_commands(CLI::App& app, Context& context) {
  CLI::App& bench = *app.add_subcommand("bench", "time our side beside dense in the same run");
  bench.require_subcommand(1);
  add_bench_attention(bench, context);
  add_bench_decode(bench, context);
  add_bench_prefill(bench, context);
  add_bench_train(bench, context);
  add_train(app, context);
  add_finetune(app, context);
  add_policies(app, context);
  add_roles(app, context);
  add_models(app, context);
  add_eval(app, context);
  add_generate(app, context);
  add_info(app, context);
}

}  // namespace natslm::cli
