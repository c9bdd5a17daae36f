// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/eval_run.h"

#include <cstdio>
#include <filesystem>

#include "natslm/base/error.h"
#include "natslm/cli/device.h"
#include "natslm/cli/interrupt.h"
#include "natslm/eval/text_streams.h"
#include "natslm/policies/policies.h"

namespace natslm::cli {
namespace {

bool is_learned(const std::string& spec) {
  return policies::Spec(spec).name() == "learned";
}

std::string megabytes(double count) {
  return fixed(count / 1048576, count < 10 * 1048576 ? 2 : 1);
}

double per_second(const EvalResult& result) {
  return static_cast<double>(result.tokens) / result.seconds;
}

nlohmann::ordered_json json_of(const EvalResult& result, const std::string& model) {
  nlohmann::ordered_json json{{"policy", result.policy}, {"model", model}};
  json.update(result.json);
  json.update({{"prefill_chunk", result.prefill_chunk},
               {"kv_end", result.kv_end},
               {"kv_end_full_windows", result.kv_end_full},
               {"kv_mean", result.kv_mean},
               {"demoted", result.demoted},
               {"kv_peak_over_cap", result.kv_peak_over_cap},
               {"kv_bytes_mean", result.kv_bytes_mean},
               {"kv_bytes_peak", result.kv_bytes_peak},
               {"batch_bytes_peak", result.batch_bytes_peak},
               {"seconds", result.seconds},
               {"tokens_per_s", per_second(result)}});
  return json;
}

}  // namespace

void EvalResult::take_keys(const eval::PerplexityResult& result) {
  kv_end = result.kv_end;
  kv_end_full = result.kv_end_full;
  kv_mean = result.kv_mean;
  kv_bytes_mean = result.kv_bytes_mean;
  kv_bytes_peak = result.kv_bytes_peak;
  batch_bytes_peak = result.batch_bytes_peak;
  demoted = result.demoted;
  kv_peak_over_cap = result.kv_peak_over_cap;
  prefill_chunk = result.prefill_chunk;
  seconds = result.seconds;
}

EvalRun::EvalRun(const EvalOptions& options, Context& context) : o_(options), context_(context) {
  const c10::Device device = device_from(o_.device);
  context_.measured_on(device);
  // Frequencies that depend on the length of a text are those of a window's.
  main_ = open_model_folder(o_.model, device, o_.protocol.context);
  if (!o_.rival_model.empty()) {
    rival_ = open_model_folder({.path = o_.rival_model, .dtype = o_.model.dtype}, device,
                               o_.protocol.context);
    NATSLM_CHECK(main_.tokenizer->fingerprint() == rival_.tokenizer->fingerprint(), o_.rival_model,
                 " has another tokenizer than ", o_.model.path,
                 ": they can only be compared over the same tokens");
  }
  protocol_ = o_.protocol;
  cache_dtype_ = !o_.cache_dtype.empty() ? o_.cache_dtype
                 : device.is_cpu()       ? "float32"
                                         : "bfloat16";
  protocol_.cache_dtype = cache_dtype_ == "bfloat16" ? at::kBFloat16 : at::kFloat;
  if (protocol_.context == 0) protocol_.context = main_.model->config().context;
}

eval::Streams EvalRun::streams(int64_t max_tokens) const {
  const std::vector<std::filesystem::path> paths(o_.text.begin(), o_.text.end());
  return eval::text_streams(paths, *main_.tokenizer, max_tokens, o_.held_out);
}

data::TokenSource EvalRun::source(const eval::Streams& streams) const {
  return {list(o_.text), 1, {streams.begin(), streams.end()}};
}

models::Model& EvalRun::model_for(const std::string& spec) {
  return rival_.model && !is_learned(spec) ? *rival_.model : *main_.model;
}

policies::KeyBudget EvalRun::budget_for(const std::string& spec) {
  if (o_.kv_mb == 0) return {o_.kv_budget, 0};
  return {0, policies::keys_in(o_.kv_mb, model_for(spec).cache_shape(protocol_.cache_dtype))};
}

void EvalRun::compare(const std::vector<std::string>& columns, int64_t units,
                      const eval::Streams& texts, const eval::PerplexityOptions& protocol,
                      const Task& task) {
  std::vector<std::string> header{"policy"};
  if (rival_.model) header.push_back("model");
  header.insert(header.end(), columns.begin(), columns.end());
  header.insert(header.end(), {"KV at end", "KV mean", "MiB mean", "MiB peak", "tokens/s"});
  table_.emplace(header);
  units_ = units;
  const eval::Evaluate evaluate = [&](models::Model& model, std::unique_ptr<cache::Policy> policy) {
    const EvalResult result = task(model, std::move(policy), [this](int64_t done) {
      throw_if_interrupted();
      progress_->update(done);
    });
    return told(result);
  };

  std::vector<std::string> specs = o_.policies;
  if (o_.equal_budget) {
    std::string learned = "learned";
    std::vector<std::string> rivals;
    for (const std::string& spec : specs) {
      if (is_learned(spec)) {
        learned = spec;
      } else if (eval::has_budget(spec)) {
        rivals.push_back(spec);
      }
    }
    if (rivals.empty()) rivals = {"streaming", "h2o", "random"};
    if (o_.kv_budget > 0) {
      learned = eval::spec_at_budget(*main_.model, learned, o_.kv_budget, texts, protocol, o_.seed);
    }
    policies_ = static_cast<int>(rivals.size()) + 2;
    next_bar();
    budget_ = eval::evaluate_at_equal_budget(*main_.model, learned,
                                             rival_.model ? *rival_.model : *main_.model, rivals,
                                             texts, protocol, o_.seed, evaluate);
  } else {
    if (specs.empty()) specs = {main_.default_policy()};
    std::vector<eval::Contender> contenders;
    for (const std::string& spec : specs)
      contenders.push_back({spec, &model_for(spec), budget_for(spec)});
    policies_ = static_cast<int>(specs.size());
    next_bar();
    eval::evaluate_each(contenders, texts, protocol, o_.seed, evaluate);
  }
  progress_.reset();
  std::fputs(table_->text().c_str(), stdout);
}

// A bar a policy.
void EvalRun::next_bar() {
  progress_.emplace("policy " + std::to_string(done_ + 1) + "/" + std::to_string(policies_),
                    units_);
}

double EvalRun::told(const EvalResult& result) {
  const bool rival = rival_.model && !is_learned(result.policy);
  std::vector<std::string> row{result.policy};
  if (rival_.model) row.push_back(rival ? "rival" : "main");
  row.insert(row.end(), result.scores.begin(), result.scores.end());
  row.insert(row.end(),
             {percent(result.kv_end), percent(result.kv_mean), megabytes(result.kv_bytes_mean),
              megabytes(static_cast<double>(result.kv_bytes_peak)), fixed(per_second(result), 0)});
  table_->add(row);
  context_.write_json(json_of(result, rival ? o_.rival_model : o_.model.path));
  if (result.kv_peak_over_cap > 0) {
    demoted_ += result.policy + ": " + std::to_string(result.demoted) +
                " keys demoted to keep the budget.\n";
  }
  if (++done_ < policies_) next_bar();
  return result.kv_end_full;
}

std::string EvalRun::budget_note() const {
  if (!o_.equal_budget) return demoted_;
  return "Equal budgets: at the end of a full window each rival keeps the share of keys that the "
         "learned roles keep, " +
         percent(budget_) + ".\n" + demoted_;
}

void add_eval_options(CLI::App& command, EvalOptions& o) {
  add_model_options(command, o.model);
  command
      .add_option("--rival-model,--dense-model", o.rival_model,
                  "another model, with the same tokenizer, for every policy but learned")
      ->type_name("DIR");
  command
      .add_option(
          "--policy", o.policies,
          "policy, as in 'streaming:sinks=4,window=252'; several times for several (see nats-lm "
          "policies); default: learned if the model has roles, else full")
      ->type_name("SPEC")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command
      .add_option("--kv-budget", o.kv_budget,
                  "KV at end, a share of the keys, to set every policy but full to; learned roles "
                  "then never pass it (not with --equal-budget). 0: as they are")
      ->check(CLI::Range(0.0, 1.0));
  command
      .add_option("--kv-mb", o.kv_mb,
                  "the same in MiB of keys and values that a window may hold; 0: as they are")
      ->check(CLI::Range(0.0, 1e9))
      ->excludes(command.get_option("--kv-budget"));
  command.add_flag(
      "--equal-budget", o.equal_budget,
      "the fair table: full, learned, and each other --policy (default: streaming, h2o, random) at "
      "the KV at end that was measured for learned");
  command.get_option("--kv-mb")->excludes(command.get_option("--equal-budget"));
  command.add_option("--text", o.text, "text files, folders, .jsonl or packed tokens")
      ->required()
      ->type_name("PATH");
  command
      .add_option("--held-out", o.held_out,
                  "read only what training on the same text holds back at this share; 0: all of it")
      ->check(CLI::Range(0.0, 0.5));
  command.add_option("--context", o.protocol.context, "tokens of a window; 0: the model's context")
      ->check(CLI::Range(0, 1 << 28));
  command.add_option("--prefill-chunk", o.protocol.prefill_chunk,
                     "tokens of a window per step; changes speed, not results");
  command.get_option("--prefill-chunk")->check(CLI::Range(1, 1 << 20));
  command
      .add_option("--batch", o.protocol.batch,
                  "windows at work at the same time; 0: what suits the model")
      ->check(CLI::Range(0, 1 << 16));
  add_device_option(command, o.device);
  command
      .add_option("--cache-dtype", o.cache_dtype,
                  "of stored keys and values; default: float32, on a GPU bfloat16, which is all it "
                  "takes")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command.add_option("--seed", o.seed, "of everything drawn: texts, and what policies draw");
}

}  // namespace natslm::cli
