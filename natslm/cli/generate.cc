// nats-lm generate: text out as it comes, then what it kept in the cache; --show-lifetimes draws
// which tokens are still alive. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/cli/command.h"
#include "natslm/cli/device.h"
#include "natslm/cli/interrupt.h"
#include "natslm/cli/lifetimes_view.h"
#include "natslm/cli/model_folder.h"
#include "natslm/cli/table.h"
#include "natslm/cli/terminal.h"
#include "natslm/engine/engine.h"
#include "natslm/eval/comparison.h"
#include "natslm/policies/learned.h"
#include "natslm/policies/policies.h"

namespace natslm::cli {
namespace {

struct Options {
  ModelOptions model;
  std::string prompt, file, policy;
  bool raw = false;
  std::string cache_dtype;  // empty: what the device takes
  double kv_budget = 0, kv_mb = 0;
  engine::GenerationOptions generation;
  int32_t prefill_chunk = 64;
  std::string device = "cpu";
  bool show_lifetimes = false;
  int32_t layer = -1, head = -1;
};

std::string read_prompt(const Options& o, bool has_prompt) {
  if (has_prompt) return o.prompt;
  if (!o.file.empty()) {
    std::ifstream file(o.file, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), {}};
    NATSLM_CHECK(file.good() || file.eof(), "cannot read the prompt from ", o.file);
    return text;
  }
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

// A model that was taught to answer gets the text as a user's message.
std::vector<int32_t> tokens_of(const std::string& text, const ModelFolder& folder, bool raw) {
  if (text.empty()) return {};
  if (folder.chat && !raw) {
    const data::ChatMessage message{.role = "user", .content = text};
    return folder.tokenizer->encode(folder.chat->render({&message, 1}));
  }
  std::vector<int32_t> tokens = folder.tokenizer->before_text();
  folder.tokenizer->encode_to(text, tokens);
  return tokens;
}

// The policy's spec with its budget set. A share means one of the keys of prompt and answer
// together. Learned roles never pass it; where nothing is known of what a bias keeps, theirs is set
// by measuring on the prompt.
std::string spec_of(const Options& o, const ModelFolder& folder, const std::vector<int32_t>& prompt,
                    const policies::PolicyContext& about) {
  std::string spec = o.policy.empty() ? folder.default_policy() : o.policy;
  if (o.kv_budget == 0 && o.kv_mb == 0) return spec;
  const std::string name = policies::Spec(spec).name();
  NATSLM_CHECK(eval::has_budget(spec), "policy ", name,
               " has no key budget: leave --kv-budget and --kv-mb out or take another policy");
  policies::KeyBudget budget{o.kv_budget, 0};
  if (o.kv_mb > 0) budget.keys = policies::keys_in(o.kv_mb, about.shape);
  const double share = eval::share_of(budget, *folder.model, about.context);
  if (name != "learned") return policies::with_budget(spec, share, about.context);
  eval::PerplexityOptions measure;
  measure.context = std::min(static_cast<int32_t>(prompt.size()), folder.model->config().context);
  measure.cache_dtype = about.shape.dtype;
  return eval::spec_under_budget(*folder.model, spec, budget, share, {prompt}, measure,
                                 o.generation.sampling.seed, about.calibration);
}

// What the cache holds of a sequence, and its tokens' roles if they have any.
LifetimesPicture picture_of(const cache::KvCache& cache, int32_t slot,
                            const policies::Learned* learned) {
  LifetimesPicture picture;
  picture.heads.resize(cache.shape().layers);
  for (int32_t layer = 0; layer < cache.shape().layers; ++layer) {
    for (int32_t head = 0; head < cache.shape().kv_heads; ++head) {
      HeadLifetimes of_head;
      if (learned != nullptr) of_head.role = learned->role_of(slot, layer, head);
      of_head.alive.resize(cache.length(slot), 0);
      for (const int32_t position : cache.live_positions(slot, layer, head))
        of_head.alive[position] = 1;
      picture.heads[layer].push_back(std::move(of_head));
    }
  }
  return picture;
}

double rate(double tokens, double seconds) {
  return seconds > 0 ? tokens / seconds : 0;
}

void generate(const Options& o, bool has_prompt, Context& context) {
  const InterruptGuard guard;
  const c10::Device device = device_from(o.device);
  context.measured_on(device);
  const ModelFolder folder = open_model_folder(o.model, device);
  const models::Config& config = folder.model->config();
  const std::vector<int32_t> prompt = tokens_of(read_prompt(o, has_prompt), folder, o.raw);
  NATSLM_CHECK(!prompt.empty(),
               "the prompt is empty: give text with --prompt, --file or standard input");
  const int32_t tokens = static_cast<int32_t>(std::min<int64_t>(
      config.context, static_cast<int64_t>(prompt.size()) + o.generation.max_new_tokens));

  const at::ScalarType cache_dtype = o.cache_dtype.empty()
                                         ? (device.is_cpu() ? at::kFloat : at::kBFloat16)
                                     : o.cache_dtype == "float32" ? at::kFloat
                                                                  : at::kBFloat16;
  policies::PolicyContext about =
      eval::policy_context(*folder.model, tokens, o.generation.sampling.seed, cache_dtype);
  about.record_roles = o.show_lifetimes;
  auto policy = policies::make_policy(spec_of(o, folder, prompt, about), about);
  const std::string spec = policy->spec();
  const auto* learned =
      o.show_lifetimes ? dynamic_cast<const policies::Learned*>(policy.get()) : nullptr;
  engine::Engine engine(*folder.model, std::move(policy), folder.tokenizer.get(),
                        {.prefill_chunk = o.prefill_chunk, .cache_dtype = cache_dtype});

  const Terminal terminal = terminal_of(1);
  LifetimesPicture picture;
  int64_t id = 0;
  std::string last_piece;
  engine::Generated result;
  engine::GenerationRequest request{.prompt = prompt, .options = o.generation};
  request.on_token = [&](const engine::NewToken& token) {
    if (!token.text.empty()) {
      last_piece = token.text;
      // A terminal is not handed what could be a command to it.
      const std::string piece = terminal.interactive ? printable(token.text) : last_piece;
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
    if (interrupted()) engine.cancel(id);
  };
  if (o.show_lifetimes) {
    request.inspect = [&](const cache::KvCache& cache, int32_t slot) {
      picture = picture_of(cache, slot, learned);
    };
  }
  request.on_done = [&](engine::Generated generated) { result = std::move(generated); };
  id = engine.submit(std::move(request));
  engine.run();
  if (!last_piece.ends_with('\n')) std::fputc('\n', stdout);

  const engine::KeyUse& use = result.use;
  if (o.show_lifetimes) {
    for (size_t i = 0; i < static_cast<size_t>(use.tokens); ++i) {
      const int32_t token = i < prompt.size() ? prompt[i] : result.tokens[i - prompt.size()];
      picture.tokens.push_back(folder.tokenizer->token_bytes(token));
    }
    ViewOptions view;
    view.palette = palette_of(terminal.colour);
    view.width = terminal.width;
    view.layer = o.layer;
    view.head = o.head;
    std::fputs(("\n" + draw_lifetimes(picture, view)).c_str(), stdout);
  }
  const double prefill = rate(static_cast<double>(result.prompt_tokens), result.prefill_seconds);
  const double decode =
      rate(static_cast<double>(use.tokens - result.prompt_tokens), result.decode_seconds);
  const double per_second = rate(static_cast<double>(result.tokens.size()),
                                 result.prefill_seconds + result.decode_seconds);
  const double keys = static_cast<double>(use.tokens) * config.layers * config.kv_heads;
  std::printf(
      "\n%s: %s of %lld tokens alive (%lld keys), KV mean %s, peak %s; prefill %.0f, decode %.0f "
      "tokens/s\n",
      spec.c_str(), percent(static_cast<double>(use.live_keys) / keys).c_str(),
      static_cast<long long>(use.tokens), static_cast<long long>(use.live_keys),
      bytes(static_cast<int64_t>(use.kv_bytes_mean)).c_str(), bytes(use.kv_bytes_peak).c_str(),
      prefill, decode);
  if (use.kv_peak_over_cap > 0) {
    std::printf("%lld keys demoted to keep the budget\n", static_cast<long long>(use.demoted));
  }
  context.write_json({{"policy", spec},
                      {"text", result.text},
                      {"finish", std::string(name(result.finish))},
                      {"prompt_tokens", result.prompt_tokens},
                      {"new_tokens", result.tokens.size()},
                      {"tokens_per_s", per_second},
                      {"prefill_tokens_per_s", prefill},
                      {"decode_tokens_per_s", decode},
                      {"kv_end", use.kv_end},
                      {"kv_mean", use.kv_mean},
                      {"live_keys", use.live_keys},
                      {"demoted", use.demoted},
                      {"kv_peak_over_cap", use.kv_peak_over_cap},
                      {"kv_bytes_mean", use.kv_bytes_mean},
                      {"kv_bytes_peak", use.kv_bytes_peak}});
  throw_if_interrupted();
}

}  // namespace

void add_generate(CLI::App& app, Context& context) {
  auto o = std::make_shared<Options>();
  auto prompt = std::make_shared<CLI::Option*>(nullptr);
  CLI::App& command =
      context.add(app, "generate", "continue a text, and show which keys stay alive",
                  [o, prompt, &context] { generate(*o, (*prompt)->count() > 0, context); });
  add_model_options(command, o->model);
  *prompt = command.add_option("--prompt", o->prompt,
                               "text to continue; else --file, else standard input");
  command.add_option("--file", o->file, "file with the text to continue")
      ->type_name("FILE")
      ->check(CLI::ExistingFile)
      ->excludes(*prompt);
  command.add_flag("--raw", o->raw,
                   "continue the text as it is, even if the model has a chat template");
  command
      .add_option("--policy", o->policy,
                  "who decides how long keys live (see nats-lm policies); default: learned if the "
                  "model has "
                  "roles, else full")
      ->type_name("SPEC");
  command
      .add_option(
          "--kv-budget", o->kv_budget,
          "share of the keys of prompt and answer to keep at the end; learned roles never hold a "
          "larger one. 0: as the policy says")
      ->check(CLI::Range(0.0, 1.0));
  command
      .add_option("--kv-mb", o->kv_mb,
                  "the same in MiB of keys and values that are alive; 0: as the policy says")
      ->check(CLI::Range(0.0, 1e9))
      ->excludes(command.get_option("--kv-budget"));
  command
      .add_option("--max-new-tokens", o->generation.max_new_tokens,
                  "stop after this many new tokens")
      ->check(CLI::Range(1, 1 << 28));
  command
      .add_option("--temperature", o->generation.sampling.temperature,
                  "0: always the best token; 1: the model's own distribution")
      ->check(CLI::Range(0.0, 100.0));
  command
      .add_option("--top-k", o->generation.sampling.top_k,
                  "draw from the k best tokens; 0: from all")
      ->check(CLI::Range(0, 1 << 28));
  command
      .add_option("--top-p", o->generation.sampling.top_p,
                  "draw from the fewest tokens that have this probability together; 1: from all")
      ->check(CLI::Range(1e-9, 1.0));
  command.add_option("--seed", o->generation.sampling.seed, "of the draws");
  command
      .add_option("--stop", o->generation.stop, "stop before this text; several times for several")
      ->type_name("TEXT")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command.add_option("--prefill-chunk", o->prefill_chunk, "tokens of the prompt per step")
      ->check(CLI::Range(1, 1 << 20));
  add_device_option(command, o->device);
  command
      .add_option("--cache-dtype", o->cache_dtype,
                  "of stored keys and values; default: float32, on a GPU bfloat16, which is all it "
                  "takes")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command.add_flag("--show-lifetimes", o->show_lifetimes,
                   "draw the text by role, and which tokens are alive at the end");
  command.add_option("--layer", o->layer, "layer that --show-lifetimes draws; -1: all together")
      ->check(CLI::Range(-1, 1 << 20));
  command.add_option("--head", o->head, "KV head that --show-lifetimes draws; -1: all together")
      ->check(CLI::Range(-1, 1 << 20));
}

}  // namespace natslm::cli
