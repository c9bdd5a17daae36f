// What the commands of `nats-lm eval` share: their options, opening what these name, and one or
// several policies side by side in a table and in JSON lines.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "natslm/cli/command.h"
#include "natslm/cli/model_folder.h"
#include "natslm/cli/progress.h"
#include "natslm/cli/table.h"
#include "natslm/data/recall_tasks.h"
#include "natslm/eval/comparison.h"
#include "natslm/eval/perplexity.h"

namespace natslm::cli {

struct EvalOptions {
  ModelOptions model;
  std::string rival_model;
  std::vector<std::string> policies;
  double kv_budget = 0, kv_mb = 0;
  bool equal_budget = false;
  std::vector<std::string> text;
  double held_out = 0;
  eval::PerplexityOptions protocol;  // context, chunk and batch are every command's
  std::string cache_dtype;           // empty: what the device takes
  std::string device = "cpu";
  uint64_t seed = 1;
};
void add_eval_options(CLI::App& command, EvalOptions& options);

// What a task says of one policy.
struct EvalResult {
  std::string policy;               // its spec
  std::vector<std::string> scores;  // cells for the task's own columns
  nlohmann::ordered_json json;      // the task's own fields
  double kv_end = 0, kv_end_full = 0, kv_mean = 0;
  double kv_bytes_mean = 0;
  int64_t kv_bytes_peak = 0, batch_bytes_peak = 0;
  int64_t demoted = 0;  // keys given up to keep a guaranteed budget, and how full that ever was
  double kv_peak_over_cap = 0;  // 0: there is none
  int32_t prefill_chunk = 0;
  int64_t tokens = 0;  // in `seconds`
  double seconds = 0;

  // All but the first three and the tokens.
  void take_keys(const eval::PerplexityResult& result);
};

class EvalRun {
 public:
  // Opens the models. Throws Error as open_model_folder does, and for a rival with another
  // tokenizer. Both arguments must outlive this.
  EvalRun(const EvalOptions& options, Context& context);

  const data::Tokenizer& tokenizer() const { return *main_.tokenizer; }
  // The options' protocol with its context and type of the cache set.
  const eval::PerplexityOptions& protocol() const { return protocol_; }
  const std::string& cache_dtype() const { return cache_dtype_; }
  // The text as streams of tokens, the first `max_tokens` (0: all).
  eval::Streams streams(int64_t max_tokens = 0) const;
  // A source made of such streams, which must outlive it.
  data::TokenSource source(const eval::Streams& streams) const;

  // Runs `task` for every policy that the options ask for, then prints the table. `columns` are
  // the task's own; `units` of its progress make up one policy; budgets are set on `texts` with
  // `protocol`.
  using Task = std::function<EvalResult(models::Model& model, std::unique_ptr<cache::Policy> policy,
                                        const eval::Progress& progress)>;
  void compare(const std::vector<std::string>& columns, int64_t units, const eval::Streams& texts,
               const eval::PerplexityOptions& protocol, const Task& task);
  // "Equal budgets: ..." if they were asked for, and what was demoted; else empty.
  std::string budget_note() const;
  // A line above the progress bar.
  void print(std::string_view line) { progress_->print(line); }

 private:
  models::Model& model_for(const std::string& spec);
  policies::KeyBudget budget_for(const std::string& spec);
  void next_bar();
  double told(const EvalResult& result);

  const EvalOptions& o_;
  Context& context_;
  ModelFolder main_, rival_;
  eval::PerplexityOptions protocol_;
  std::string cache_dtype_, demoted_;
  int64_t units_ = 0;
  int policies_ = 0, done_ = 0;
  double budget_ = 0;
  std::optional<Table> table_;
  std::optional<Progress> progress_;
};

// eval_ppl.cc, eval_repeat.cc, eval_facts.cc
void add_eval_ppl(CLI::App& eval, Context& context);
void add_eval_repeat(CLI::App& eval, Context& context);
void add_eval_facts(CLI::App& eval, Context& context);

}  // namespace natslm::cli
