// nats-lm train: a model and its roles together, from text to a model folder.
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
#include "natslm/cli/field_options.h"
#include "natslm/cli/interrupt.h"
#include "natslm/cli/progress.h"
#include "natslm/cli/table.h"
#include "natslm/models/models.h"
#include "natslm/train/device.h"
#include "natslm/train/recipes.h"
#include "natslm/train/run_text.h"
#include "natslm/train/trainer.h"
#include "natslm/train/validate.h"

namespace natslm::cli {

namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::string preset = "tiny";
  std::vector<std::string> text, validation;
  double held_out = 0.05;
  std::string tokenizer;
  int32_t vocabulary = 0, window = -1, role_chunk = 1, kv_heads = 0;
  std::string roles = "gls";
  int64_t validation_windows = 64;
  std::string device = "cpu";
  bool graph = true;
  std::string out, resume;
  train::Options options = train::recipe("tiny");
};

// Where --resume DIR points: the run's folder and the checkpoint to continue from.
struct Resumption {
  fs::path folder, checkpoint;
};

Resumption find_resumption(const std::string& named) {
  const fs::path path = fs::path(named).lexically_normal();
  NATSLM_CHECK(fs::is_directory(path), named,
               " is not a folder; --resume takes the --out folder of a "
               "run, or one of the checkpoints in it");
  if (fs::exists(path / "trainer.json")) {
    const fs::path checkpoint = path.has_filename() ? path : path.parent_path();
    return {fs::absolute(checkpoint).parent_path().parent_path(), checkpoint};
  }
  const fs::path latest = train::Checkpoints(train::checkpoint_folder(path), 1).latest();
  NATSLM_CHECK(!latest.empty(), "there is no checkpoint in ", named,
               " to resume from; start the run again with --out");
  return {path, latest};
}

class Display : public train::Observer {
 public:
  Display(int64_t steps, int64_t first) : progress_("training", steps) {
    progress_.restart_at(first);
  }
  void on_step(const train::StepReport& r) override {
    // Smoothed as the eye would.
    loss_ = loss_ == 0 ? r.loss : 0.95 * loss_ + 0.05 * r.loss;
    std::string note = "loss " + fixed(loss_, 3) + "  " + fixed(r.tokens_per_s, 0) + " tokens/s";
    if (r.lambda > 0) {
      note += "  KV end " + percent(r.kv_end) + "  mean " + percent(r.sampled.kv_mean) +
              "  pairs " + percent(r.sampled.pairs) + "  lambda " + fixed(r.lambda, 4);
    }
    progress_.update(r.step, note);
  }
  void on_validation(int64_t step, const train::Validation& v) override {
    progress_.print("step " + std::to_string(step) + ": validation perplexity " +
                    fixed(v.perplexity, 3) + ", KV at end " + percent(v.shares.kv_end) + ", mean " +
                    percent(v.shares.kv_mean));
  }

 private:
  Progress progress_;
  double loss_ = 0;
};

class Run {
 public:
  Run(Arguments& arguments, CLI::App& command, Context& context)
      : a_(arguments), command_(command), context_(context) {}

  void operator()() {
    const c10::Device device = device_from(a_.device);
    context_.measured_on(device);
    if (device.is_cuda()) train::prepare_cuda();
    if (a_.resume.empty()) {
      for (const char* name : {"text", "out"})
        if (!given(name)) throw CLI::RequiredError(std::string("--") + name + " (or --resume)");
      begin();
    } else {
      continue_from(find_resumption(a_.resume));
    }
    report_fields(command_, a_.options);
    if (device.is_cuda()) model_->to(device);
    train();
  }

 private:
  bool given(const std::string& name) const {
    return command_.get_option("--" + name)->count() > 0;
  }

  models::Config config() {
    models::Config config = models::preset(a_.preset).config;
    config.roles.set = roles::role_set_from(a_.roles);
    config.roles.chunk = a_.role_chunk;
    config.context = static_cast<int32_t>(a_.options.context);
    config.roles.window = a_.window >= 0 ? a_.window : models::default_window(config.context);
    if (a_.kv_heads > 0) config.kv_heads = a_.kv_heads;
    if (a_.vocabulary > 0) config.vocabulary = a_.vocabulary;
    return config;
  }

  void begin() {
    complete(command_, a_.options, train::recipe(a_.preset));
    if (given("lambda")) a_.options.kv_budget = 0;
    models::Config wanted = config();
    models::check(wanted);
    train::check(a_.options);
    folder_ = a_.out;
    std::error_code error;
    NATSLM_CHECK(!fs::exists(folder_ / "model.safetensors") &&
                     train::Checkpoints(train::checkpoint_folder(folder_), 1).latest().empty(),
                 "--out ", a_.out, " already holds a run; continue it with --resume ", a_.out,
                 ", or choose another folder");
    fs::create_directories(folder_, error);
    NATSLM_CHECK(!error, "--out ", a_.out, " cannot be made: ", error.message());

    train::TextOptions text;
    text.text.assign(a_.text.begin(), a_.text.end());
    text.validation.assign(a_.validation.begin(), a_.validation.end());
    text.held_out = a_.held_out;
    text.tokenizer = a_.tokenizer;
    text.vocabulary = wanted.vocabulary;
    std::optional<Progress> progress;
    std::string stage;
    text_ = train::prepare_text(text, folder_,
                                [&](const std::string& what, uint64_t done, uint64_t total) {
                                  if (what != stage)
                                    progress.emplace(stage = what, int64_t(total >> 10));
                                  progress->update(int64_t(done >> 10), "KiB");
                                  return !interrupted();
                                });
    progress.reset();
    wanted.vocabulary = text_.tokenizer->vocabulary();
    model_ = models::make_model(wanted, a_.options.seed);
  }

  void continue_from(const Resumption& from) {
    for (const char* name : {"text", "validation", "held-out", "tokenizer", "vocabulary", "roles",
                             "window", "role-chunk", "kv-heads", "preset"})
      NATSLM_CHECK(!given(name), "--", name, " cannot be given with --resume: the run in ",
                   from.folder.string(), " has its own; leave it out");
    NATSLM_CHECK(
        a_.out.empty() || fs::weakly_canonical(a_.out) == fs::weakly_canonical(from.folder),
        "--out ", a_.out, " is not the folder of the run to resume, ", from.folder.string(),
        "; leave it out");
    folder_ = from.folder;
    checkpoint_ = from.checkpoint;
    complete(command_, a_.options, train::options_of(train::open_checkpoint(checkpoint_)));
    text_ = train::open_text(folder_);
    model_ = models::load_model(checkpoint_);
  }

  void train() {
    const data::TokenDataset dataset(text_.train, a_.options.seed);
    std::optional<data::TokenDataset> held_out;
    if (!text_.validation.empty()) held_out.emplace(text_.validation, a_.options.seed);
    train::Parts parts;
    parts.tokenizer = text_.tokenizer.get();
    parts.stop = interrupted;
    parts.graph = a_.graph;
    parts.identity = {{"text", train::fingerprint(text_)}};
    if (held_out && held_out->windows(a_.options.context) > 0) {
      parts.validate = [&] {
        return train::validate(*model_, *held_out, a_.options.context, a_.options.batch,
                               a_.validation_windows);
      };
    } else if (held_out) {
      std::fprintf(stderr, "The held-out text is shorter than a window: no validation.\n");
    }
    train::Trainer trainer(*model_, dataset, a_.options, folder_, parts);
    if (!checkpoint_.empty()) trainer.resume(checkpoint_);
    describe(dataset, trainer.steps_done());
    train::Result result;
    {
      Display display(a_.options.steps, trainer.steps_done());
      trainer.observe(&display);
      result = trainer.run();
    }
    context_.write_json(train::to_json(result));
    if (result.stopped) {
      fail("interrupted after step ", result.steps, " of ", a_.options.steps,
           "; continue with --resume ", folder_.string());
    }
    models::save_model(*model_, folder_);
    text_.tokenizer->save(folder_);
    summarise(result);
  }

  void describe(const data::TokenDataset& dataset, int64_t first) const {
    const models::Config& c = model_->config();
    int64_t weights = 0;
    for (const auto& [name, tensor] : model_->parameters()) weights += tensor.numel();
    const double epochs =
        double(a_.options.steps * a_.options.batch) / double(dataset.windows(a_.options.context));
    std::fprintf(stderr,
                 "%lld weights, %d layers, %d/%d heads, roles %s (window %d); %lld tokens of text, "
                 "%.2f epochs%s\n",
                 static_cast<long long>(weights), c.layers, c.q_heads, c.kv_heads,
                 std::string(roles::name(c.roles.set)).c_str(), c.roles.window,
                 static_cast<long long>(dataset.tokens()), epochs,
                 first > 0 ? (", from step " + std::to_string(first)).c_str() : "");
  }

  void summarise(const train::Result& r) const {
    Table table({"what", "value"});
    table.add({"model", folder_.string()});
    table.add({"steps", std::to_string(r.steps)});
    table.add({"tokens", std::to_string(r.tokens)});
    table.add({"tokens/s", fixed(r.tokens_per_s, 0)});
    table.add({"loss", fixed(r.loss, 4)});
    if (r.validation_perplexity)
      table.add({"validation perplexity", fixed(*r.validation_perplexity, 3)});
    table.add({"KV at end", percent(r.shares.kv_end)});
    table.add({"KV mean", percent(r.shares.kv_mean)});
    table.add({"pairs", percent(r.shares.pairs)});
    table.add({"lambda", fixed(r.lambda, 4)});
    table.add({"peak memory", bytes(r.peak_bytes)});
    if (r.peak_device_bytes > 0) table.add({"peak GPU memory", bytes(r.peak_device_bytes)});
    std::fputs(table.text().c_str(), stdout);
  }

  Arguments& a_;
  CLI::App& command_;
  Context& context_;
  fs::path folder_, checkpoint_;
  train::RunText text_;
  std::unique_ptr<models::Model> model_;
  const InterruptGuard guard_;
};

}  // namespace

void add_train(CLI::App& app, Context& context) {
  auto a = std::make_shared<Arguments>();
  auto self = std::make_shared<CLI::App*>();
  CLI::App& command = context.add(app, "train", "train a model and its roles together, from text",
                                  [a, self, &context] { Run(*a, **self, context)(); });
  *self = &command;
  command.add_option("--text", a->text, "text files, folders, .jsonl or packed tokens")
      ->type_name("PATH");
  command.add_option("--out", a->out, "folder for the model and all files of the run")
      ->type_name("DIR");
  command
      .add_option("--resume", a->resume,
                  "continue the run in this folder (its --out, or a checkpoint in it)")
      ->type_name("DIR");
  std::vector<std::string> presets;
  for (const models::Preset& preset : models::presets()) presets.emplace_back(preset.name);
  command
      .add_option("--preset", a->preset,
                  "sizes of the model, and how it is trained (shown below: tiny's)")
      ->check(CLI::IsMember(presets));
  command.add_option("--roles", a->roles, "roles a token may have; dense: all are kept for ever")
      ->check(CLI::IsMember({"gls", "gs", "gl", "dense"}));
  command.add_option("--window", a->window, "tokens a Sliding token lives; -1: context / 32")
      ->check(CLI::Range(-1, 1 << 28));
  command.add_option("--role-chunk", a->role_chunk, "tokens that share a role")
      ->check(CLI::Range(1, 1 << 20));
  command.add_option("--kv-heads", a->kv_heads, "key/value heads; 0: as many as query heads")
      ->check(CLI::Range(0, 4096));
  command
      .add_option("--tokenizer", a->tokenizer,
                  "folder or tokenizer.json; default: one is trained on the text")
      ->type_name("PATH");
  command
      .add_option("--vocabulary", a->vocabulary,
                  "tokens of the tokenizer that is trained; 0: the preset's")
      ->check(CLI::Range(0, 1 << 24));
  CLI::Option* validation =
      command.add_option("--validation", a->validation, "held-out text, as --text")
          ->type_name("PATH");
  command
      .add_option("--held-out", a->held_out,
                  "share of the text, whole files, that is not trained on but validated with")
      ->check(CLI::Range(0.0, 0.5))
      ->excludes(validation);
  command
      .add_option("--validation-windows", a->validation_windows,
                  "windows a validation reads; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  add_device_option(command, a->device);
  command.add_option("--cuda-graph", a->graph,
                     "on a GPU: record a step once and repeat it; false: launch each kernel anew");
  add_field_options(command, a->options);
  command.get_option("--lambda")->excludes(command.get_option("--kv-budget"));
}

}  // namespace natslm::cli
