// nats-lm eval ppl: perplexity through the evicting cache, for one policy or several side by side.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/cli/command.h"
#include "natslm/cli/device.h"
#include "natslm/cli/interrupt.h"
#include "natslm/cli/model_folder.h"
#include "natslm/cli/progress.h"
#include "natslm/cli/table.h"
#include "natslm/eval/comparison.h"
#include "natslm/eval/perplexity.h"
#include "natslm/eval/tasks.h"
#include "natslm/eval/text_streams.h"
#include "natslm/policies/policies.h"

namespace natslm::cli {
namespace {

struct Options {
  ModelOptions model;
  std::string rival_model;
  std::vector<std::string> policies;
  double kv_budget = 0, kv_mb = 0;
  bool equal_budget = false;
  std::vector<std::string> text;
  double held_out = 0;
  eval::PerplexityOptions protocol;
  std::string cache_dtype;  // empty: what the device takes
  std::string device = "cpu";
  uint64_t seed = 1;
};

bool is_learned(const std::string& spec) {
  return policies::Spec(spec).name() == "learned";
}

std::string megabytes(double count) {
  return fixed(count / 1048576, count < 10 * 1048576 ? 2 : 1);
}

double per_second(const eval::PerplexityResult& result) {
  return static_cast<double>(result.tokens) / result.seconds;
}

nlohmann::ordered_json json_of(const eval::PerplexityResult& result, const std::string& model) {
  return {{"policy", result.policy},
          {"model", model},
          {"perplexity", result.perplexity},
          {"nll", result.nll},
          {"tokens", result.tokens},
          {"windows", result.windows},
          {"prefill_chunk", result.prefill_chunk},
          {"kv_end", result.kv_end},
          {"kv_end_full_windows", result.kv_end_full},
          {"kv_mean", result.kv_mean},
          {"demoted", result.demoted},
          {"kv_peak_over_cap", result.kv_peak_over_cap},
          {"kv_bytes_mean", result.kv_bytes_mean},
          {"kv_bytes_peak", result.kv_bytes_peak},
          {"batch_bytes_peak", result.batch_bytes_peak},
          {"seconds", result.seconds},
          {"tokens_per_s", per_second(result)}};
}

class Run {
 public:
  Run(const Options& options, Context& context) : o_(options), context_(context) {}

  void operator()() {
    const InterruptGuard guard;
    prepare();
    if (o_.equal_budget) {
      equal_budget();
    } else {
      side_by_side();
    }
    progress_.reset();
    std::fputs(table_->text().c_str(), stdout);
    std::fputs(notes().c_str(), stdout);
  }

 private:
  void prepare() {
    const c10::Device device = device_from(o_.device);
    context_.measured_on(device);
    // Frequencies that depend on the length of a text are those of a window's.
    main_ = open_model_folder(o_.model, device, o_.protocol.context);
    if (!o_.rival_model.empty()) {
      rival_ = open_model_folder({.path = o_.rival_model, .dtype = o_.model.dtype}, device,
                                 o_.protocol.context);
      NATSLM_CHECK(main_.tokenizer->fingerprint() == rival_.tokenizer->fingerprint(),
                   o_.rival_model, " has another tokenizer than ", o_.model.path,
                   ": perplexities can only be compared over the same tokens");
    }
    protocol_ = o_.protocol;
    cache_dtype_ = !o_.cache_dtype.empty() ? o_.cache_dtype
                   : device.is_cpu()       ? "float32"
                                           : "bfloat16";
    protocol_.cache_dtype = cache_dtype_ == "bfloat16" ? at::kBFloat16 : at::kFloat;
    if (protocol_.context == 0) protocol_.context = main_.model->config().context;
    const std::vector<std::filesystem::path> paths(o_.text.begin(), o_.text.end());
    streams_ = eval::text_streams(paths, *main_.tokenizer, protocol_.max_tokens, o_.held_out);
    std::vector<int64_t> lengths;
    for (const auto& stream : streams_) lengths.push_back(static_cast<int64_t>(stream.size()));
    for (const eval::Window& window : eval::windows(lengths, protocol_))
      to_score_ += window.scored();

    std::vector<std::string> header{"policy",   "perplexity", "KV at end", "KV mean",
                                    "MiB mean", "MiB peak",   "tokens/s"};
    if (rival_.model) header.insert(header.begin() + 1, "model");
    table_.emplace(header);
  }

  models::Model& model_for(const std::string& spec) {
    return rival_.model && !is_learned(spec) ? *rival_.model : *main_.model;
  }

  policies::KeyBudget budget_for(const std::string& spec) {
    if (o_.kv_mb == 0) return {o_.kv_budget, 0};
    return {0, policies::keys_in(o_.kv_mb, model_for(spec).cache_shape(protocol_.cache_dtype))};
  }

  void side_by_side() {
    std::vector<std::string> specs = o_.policies;
    if (specs.empty()) specs = {main_.default_policy()};
    std::vector<eval::Contender> contenders;
    for (const std::string& spec : specs)
      contenders.push_back({spec, &model_for(spec), budget_for(spec)});
    start(static_cast<int>(contenders.size()));
    eval::compare(contenders, streams_, protocol_, o_.seed, on_result(), on_progress());
  }

  void equal_budget() {
    std::string learned = "learned";
    std::vector<std::string> rivals;
    for (const std::string& spec : o_.policies) {
      if (is_learned(spec)) {
        learned = spec;
      } else if (eval::has_budget(spec)) {
        rivals.push_back(spec);
      }
    }
    if (rivals.empty()) rivals = {"streaming", "h2o", "random"};
    if (o_.kv_budget > 0) {
      learned =
          eval::spec_at_budget(*main_.model, learned, o_.kv_budget, streams_, protocol_, o_.seed);
    }
    start(static_cast<int>(rivals.size()) + 2);
    const auto results = eval::compare_at_equal_budget(
        *main_.model, learned, rival_.model ? *rival_.model : *main_.model, rivals, streams_,
        protocol_, o_.seed, on_result(), on_progress());
    budget_ = results[1].kv_end_full;
  }

  // A bar a policy.
  void start(int policies) {
    policies_ = policies;
    next_bar();
  }
  void next_bar() {
    progress_.emplace("policy " + std::to_string(done_ + 1) + "/" + std::to_string(policies_),
                      to_score_);
  }
  eval::Progress on_progress() {
    return [this](int64_t scored) {
      throw_if_interrupted();
      progress_->update(scored);
    };
  }
  std::function<void(const eval::PerplexityResult&)> on_result() {
    return [this](const eval::PerplexityResult& result) {
      const bool rival = rival_.model && !is_learned(result.policy);
      const std::string& folder = rival ? o_.rival_model : o_.model.path;
      std::vector<std::string> row{result.policy,
                                   fixed(result.perplexity, result.perplexity < 1000 ? 3 : 0),
                                   percent(result.kv_end),
                                   percent(result.kv_mean),
                                   megabytes(result.kv_bytes_mean),
                                   megabytes(static_cast<double>(result.kv_bytes_peak)),
                                   fixed(per_second(result), 0)};
      if (rival_.model) row.insert(row.begin() + 1, rival ? "rival" : "main");
      table_->add(row);
      context_.write_json(json_of(result, folder));
      windows_ = result.windows;
      if (result.kv_peak_over_cap > 0) {
        demoted_ += result.policy + ": " + std::to_string(result.demoted) +
                    " keys demoted to keep the budget.\n";
      }
      if (++done_ < policies_) next_bar();
    };
  }

  std::string notes() const {
    const std::string window =
        protocol_.continuous
            ? "one continuous window a file"
            : std::to_string(windows_) + (windows_ == 1 ? " window" : " windows") + " of up to " +
                  std::to_string(protocol_.context) + " tokens" +
                  (protocol_.stride > 0 ? ", stride " + std::to_string(protocol_.stride) : "");
    std::string text = "\n" + std::to_string(to_score_) + " tokens scored a policy, " + window +
                       "; bytes of keys and values held by one sequence, " + cache_dtype_ + ".\n";
    if (o_.equal_budget) {
      text +=
          "Equal budgets: at the end of a full window each rival keeps the share of keys that the "
          "learned "
          "roles keep, " +
          percent(budget_) + ".\n";
    }
    return text + demoted_;
  }

  const Options& o_;
  Context& context_;
  ModelFolder main_, rival_;
  eval::PerplexityOptions protocol_;
  std::string cache_dtype_, demoted_;
  eval::Streams streams_;
  int64_t to_score_ = 0, windows_ = 0;
  int policies_ = 0, done_ = 0;
  double budget_ = 0;
  std::optional<Table> table_;
  std::optional<Progress> progress_;
};

void add_ppl(CLI::App& parent, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(parent, "ppl", std::string(eval::task("ppl").summary),
                                  [o, &context] { Run(*o, context)(); });
  add_model_options(command, o->model);
  command
      .add_option("--rival-model,--dense-model", o->rival_model,
                  "another model, with the same tokenizer, for every policy but learned")
      ->type_name("DIR");
  command
      .add_option(
          "--policy", o->policies,
          "policy, as in 'streaming:sinks=4,window=252'; several times for several (see nats-lm "
          "policies); default: learned if the model has roles, else full")
      ->type_name("SPEC")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command
      .add_option("--kv-budget", o->kv_budget,
                  "KV at end, a share of the keys, to set every policy but full to; learned roles "
                  "then never pass it (not with --equal-budget). 0: as they are")
      ->check(CLI::Range(0.0, 1.0));
  command
      .add_option("--kv-mb", o->kv_mb,
                  "the same in MiB of keys and values that a window may hold; 0: as they are")
      ->check(CLI::Range(0.0, 1e9))
      ->excludes(command.get_option("--kv-budget"));
  command.add_flag(
      "--equal-budget", o->equal_budget,
      "the fair table: full, learned, and each other --policy (default: streaming, h2o, random) at "
      "the KV at end that was measured for learned");
  command.get_option("--kv-mb")->excludes(command.get_option("--equal-budget"));
  command.add_option("--text", o->text, "text files, folders, .jsonl or packed tokens")
      ->required()
      ->type_name("PATH");
  command
      .add_option("--held-out", o->held_out,
                  "read only what training on the same text holds back at this share; 0: all of it")
      ->check(CLI::Range(0.0, 0.5));
  command
      .add_option("--context", o->protocol.context, "tokens of a window; 0: the model's context")
      ->check(CLI::Range(0, 1 << 28));
  command
      .add_option("--stride", o->protocol.stride,
                  "windows overlap and only their last tokens, so many, are scored; 0: no overlap")
      ->check(CLI::Range(0, 1 << 28));
  command.add_flag(
      "--continuous", o->protocol.continuous,
      "one cache, never reset, over each whole file; beyond the model's context only for "
      "policies that renumber positions, such as streaming");
  command.add_option("--prefill-chunk", o->protocol.prefill_chunk,
                     "tokens of a window per step; changes speed, not results");
  command.get_option("--prefill-chunk")->check(CLI::Range(1, 1 << 20));
  command
      .add_option("--max-tokens", o->protocol.max_tokens,
                  "read only the first tokens, so many; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  command
      .add_option("--batch", o->protocol.batch,
                  "windows at work at the same time; 0: what suits the model")
      ->check(CLI::Range(0, 1 << 16));
  add_device_option(command, o->device);
  command
      .add_option("--cache-dtype", o->cache_dtype,
                  "of stored keys and values; default: float32, on a GPU bfloat16, which is all it "
                  "takes")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command.add_option("--seed", o->seed, "of policies that draw");
}

}  // namespace

void add_eval(CLI::App& app, Context& context) {
  CLI::App& eval = *app.add_subcommand("eval", "measure quality through the real evicting cache");
  eval.require_subcommand(1);
  add_ppl(eval, context);
}

}  // namespace natslm::cli
