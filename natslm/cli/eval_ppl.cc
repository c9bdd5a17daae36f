// nats-lm eval ppl: perplexity through the evicting cache, for one policy or several side by side.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "natslm/cli/eval_run.h"
#include "natslm/cli/interrupt.h"
#include "natslm/eval/perplexity.h"
#include "natslm/eval/tasks.h"
#include "natslm/policies/policies.h"

namespace natslm::cli {
namespace {

EvalResult row_of(const eval::PerplexityResult& result) {
  EvalResult row;
  row.take_keys(result);
  row.policy = result.policy;
  row.tokens = result.tokens;
  row.scores = {fixed(result.perplexity, result.perplexity < 1000 ? 3 : 0)};
  row.json = {{"perplexity", result.perplexity},
              {"nll", result.nll},
              {"nll_stderr", result.nll_error},
              {"tokens", result.tokens},
              {"windows", result.windows}};
  return row;
}

void eval_ppl(const EvalOptions& o, bool agreement, Context& context) {
  const InterruptGuard guard;
  EvalRun run(o, context);
  eval::PerplexityOptions protocol = run.protocol();
  protocol.keep_best = agreement;
  const eval::Streams streams = run.streams(protocol.max_tokens);
  std::vector<int64_t> lengths;
  for (const auto& stream : streams) lengths.push_back(std::ssize(stream));
  int64_t to_score = 0, windows = 0;
  for (const eval::Window& window : eval::windows(lengths, protocol)) to_score += window.scored();

  std::optional<eval::PerplexityResult> full;
  std::vector<std::string> columns{"perplexity"};
  if (agreement) columns.push_back("as full");
  run.compare(
      columns, to_score, streams, protocol,
      [&](models::Model& model, std::unique_ptr<cache::Policy> policy,
          const eval::Progress& progress) {
        // Of the same weights: with every key alive the roles do nothing.
        if (agreement && !full) {
          full = eval::perplexity(model, policies::make_policy("full", eval::policy_context(model)),
                                  streams, protocol, progress);
        }
        const auto result = eval::perplexity(model, std::move(policy), streams, protocol, progress);
        windows = result.windows;
        EvalResult row = row_of(result);
        if (agreement) {
          const double share = eval::agreement(*full, result);
          row.scores.push_back(percent(share));
          row.json["top1_agreement"] = share;
        }
        return row;
      });

  const std::string window =
      protocol.continuous
          ? "one continuous window a file"
          : std::to_string(windows) + (windows == 1 ? " window" : " windows") + " of up to " +
                std::to_string(protocol.context) + " tokens" +
                (protocol.stride > 0 ? ", stride " + std::to_string(protocol.stride) : "");
  const std::string notes = "\n" + std::to_string(to_score) + " tokens scored a policy, " + window +
                            "; bytes of keys and values held by one sequence, " +
                            run.cache_dtype() + ".\n" + run.budget_note();
  std::fputs(notes.c_str(), stdout);
}

}  // namespace

void add_eval_ppl(CLI::App& eval, Context& context) {
  auto o = std::make_shared<EvalOptions>();
  auto agreement = std::make_shared<bool>(false);
  CLI::App& command = context.add(eval, "ppl", std::string(eval::task("ppl").summary),
                                  [o, agreement, &context] { eval_ppl(*o, *agreement, context); });
  add_eval_options(command, *o);
  command
      .add_option("--stride", o->protocol.stride,
                  "windows overlap and only their last tokens, so many, are scored; 0: no overlap")
      ->check(CLI::Range(0, 1 << 28));
  command.add_flag(
      "--continuous", o->protocol.continuous,
      "one cache, never reset, over each whole file; beyond the model's context only for "
      "policies that renumber positions, such as streaming");
  command.add_flag(
      "--agreement", *agreement,
      "also how often the best next token is the one that the first policy's model has "
      "with every key alive");
  command
      .add_option("--max-tokens", o->protocol.max_tokens,
                  "read only the first tokens, so many; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
}

}  // namespace natslm::cli
