// nats-lm finetune: score layers for a frozen pretrained model, as a side-car.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/finetune.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/version.h"
#include "natslm/cli/command.h"
#include "natslm/cli/device.h"
#include "natslm/cli/field_options.h"
#include "natslm/cli/interrupt.h"
#include "natslm/cli/model_folder.h"
#include "natslm/cli/progress.h"
#include "natslm/cli/table.h"
#include "natslm/data/recall_tasks.h"
#include "natslm/models/models.h"
#include "natslm/models/side_car.h"
#include "natslm/train/device.h"
#include "natslm/train/fields_json.h"
#include "natslm/train/finetune_text.h"

namespace natslm::cli {
namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::string model, dtype;
  std::vector<std::string> text, carriers;
  std::string recipe = "nats-lm";
  std::string out;
  bool resume = false;
  double plain = 0.55, repeat = 0.2, facts = 0.25;
  int64_t calibration_texts = 8, calibration_points = 13;
  double calibration_range = 18;
  int64_t compare_dense = 0;
  std::string device = "cpu";
  train::FinetuneOptions options = train::finetune_recipe("nats-lm").options;
};

class Run {
 public:
  Run(Arguments& arguments, CLI::App& command, Context& context)
      : a_(arguments), command_(command), context_(context) {}

  void operator()() {
    const c10::Device device = device_from(a_.device);
    context_.measured_on(device);
    if (device.is_cuda()) train::prepare_cuda();
    recipe_ = &train::finetune_recipe(a_.recipe);
    complete(command_, a_.options, recipe_->options);
    check(a_.options);
    report_fields(command_, a_.options);
    NATSLM_CHECK(a_.resume || !fs::exists(a_.out), "--out ", a_.out,
                 " is already there; choose another name, or remove it");
    open(device);
    read_text();
    teach();
  }

 private:
  void open(const c10::Device& device) {
    opened_ = open_tokenizer(a_.model);
    const models::Config config = models::load_config(a_.model);
    NATSLM_CHECK(a_.options.context <= config.context, "--context is ", a_.options.context,
                 "; the model in ", a_.model, " reads at most ", config.context, " tokens");
    opened_.model =
        models::load_model(a_.model, {.type = weights_type(a_.dtype, device),
                                      .context = static_cast<int32_t>(a_.options.context),
                                      .roles = train::role_options(a_.options),
                                      .seed = a_.options.seed});
    opened_.model->to(device);
    if (a_.options.method == train::kAdapterMethod)
      train::add_adapters(*opened_.model, a_.options.seed);
  }

  void read_text() {
    train::FinetuneTextOptions o;
    o.text.assign(a_.text.begin(), a_.text.end());
    o.carriers.assign(a_.carriers.begin(), a_.carriers.end());
    o.tokens = a_.options.steps * a_.options.batch * (a_.options.context + 1);
    o.context = a_.options.context;
    o.held_out_texts = a_.options.method == train::kRolesMethod ? a_.calibration_texts : 0;
    o.seed = a_.options.seed;
    Progress progress("reading text", o.tokens);
    text_ = train::read_finetune_text(o, *opened_.tokenizer, [&](int64_t done, int64_t) {
      progress.update(std::min(done, o.tokens), "tokens");
      return !interrupted();
    });
  }

  data::TrainingMix mix() const {
    const auto sources = [](const std::vector<train::FinetuneSource>& from) {
      std::vector<data::TokenSource> all;
      for (const train::FinetuneSource& source : from) {
        data::TokenSource one{.name = source.name, .weight = 1, .documents = {}};
        for (const auto& document : source.documents) one.documents.emplace_back(document);
        all.push_back(std::move(one));
      }
      return all;
    };
    data::MixOptions o;
    if (recipe_->mix == "passkeys") {
      o = data::passkey_mix(a_.options.context, a_.options.seed);
    } else {
      o.context = a_.options.context;
      o.seed = a_.options.seed;
      o.plain = a_.plain;
      o.repeat = a_.repeat;
      o.facts = a_.facts;
    }
    return {*opened_.tokenizer, sources(text_.text), sources(text_.carriers), o};
  }

  void teach() {
    const data::TrainingMix mix = this->mix();
    data::Sample sample;
    const auto samples = [&](int64_t number, std::span<int32_t> tokens, std::span<float> weights) {
      mix.sample(number, sample);
      std::ranges::copy(sample.tokens, tokens.begin());
      std::ranges::copy(sample.weights, weights.begin());
    };
    std::optional<Progress> progress;
    double loss = 0;
    train::FinetuneParts parts;
    parts.identity = models::identity(*opened_.model) + " " + text_.fingerprint + " " + a_.recipe +
                     " " + nlohmann::json({a_.plain, a_.repeat, a_.facts}).dump();
    parts.stop = interrupted;
    parts.on_step = [&](const train::StepReport& r) {
      loss = loss == 0 ? r.loss : 0.9 * loss + 0.1 * r.loss;
      std::string note = "loss " + fixed(loss, 3) + "  " + fixed(r.tokens_per_s, 0) + " tokens/s";
      if (a_.options.method == train::kRolesMethod)
        note += "  pairs " + percent(r.sampled.pairs) + "  KV end " + percent(r.sampled.kv_end) +
                "  lambda " + fixed(r.lambda, 4);
      progress->update(r.step, note);
    };
    const fs::path folder = a_.out + ".run";
    train::FineTuner tuner(*opened_.model, samples, a_.options, folder, parts);
    if (a_.resume) {
      NATSLM_CHECK(tuner.resume(), "there is no checkpoint in ", folder.string(),
                   " to resume from; start without --resume");
    }
    progress.emplace("teaching", a_.options.steps);
    progress->restart_at(tuner.steps_done());
    const train::FinetuneResult result = tuner.run();
    progress.reset();
    NATSLM_CHECK(!result.stopped || result.steps > 0, "interrupted before the first step");
    if (result.stopped)
      fail("interrupted after step ", result.steps, " of ", a_.options.steps,
           "; the same command with --resume continues");

    models::SideCar side_car = models::side_car_of(*opened_.model);
    if (!text_.held_out.empty()) calibrate(side_car);
    side_car.notes = notes(result);
    models::write_side_car(a_.out, side_car);
    nlohmann::ordered_json json = train::to_json(result);
    json["calibration"] = {{"bias", side_car.calibration.bias},
                           {"kv_end", side_car.calibration.kv_end}};
    if (a_.compare_dense > 0) {
      dense_ms_ = tuner.dense_step_ms(a_.compare_dense);
      json["step_ms"] = 1e3 * result.seconds / static_cast<double>(result.steps);
      json["dense_step_ms"] = dense_ms_;
    }
    context_.write_json(json);
    summarise(result, side_car);
    std::error_code ignored;
    fs::remove_all(folder, ignored);
  }

  void calibrate(models::SideCar& side_car) {
    const std::vector<float> biases =
        train::calibration_biases(a_.calibration_range, a_.calibration_points);
    Progress progress("measuring budgets",
                      std::ssize(biases) * std::ssize(text_.held_out) / a_.options.context);
    side_car.calibration = train::calibrate(*opened_.model, text_.held_out, a_.options.context,
                                            biases, [&](int64_t done, int64_t) {
                                              progress.update(done);
                                              throw_if_interrupted();
                                            });
  }

  std::map<std::string, std::string> notes(const train::FinetuneResult& result) const {
    std::string sources;
    for (const auto* group : {&text_.text, &text_.carriers})
      for (const train::FinetuneSource& source : *group)
        sources += (sources.empty() ? "" : ", ") + source.name;
    const std::string mix = recipe_->mix == "passkeys"
                                ? std::string(recipe_->mix)
                                : "plain " + fixed(a_.plain, 2) + ", repeat " +
                                      fixed(a_.repeat, 2) + ", facts " + fixed(a_.facts, 2);
    return {{"recipe", a_.recipe},
            {"mix", mix},
            {"settings", train::fields_json(a_.options).dump()},
            {"texts", sources},
            {"text_fingerprint", text_.fingerprint},
            {"steps", std::to_string(result.steps)},
            {"training_pairs", fixed(result.pairs, 4)},
            {"training_bias_range", fixed(a_.options.bias_range, 2)},
            {"version", std::string(version()) + " " + std::string(commit())}};
  }

  void summarise(const train::FinetuneResult& r, const models::SideCar& side_car) const {
    Table table({"what", "value"});
    table.add({"side-car", a_.out});
    table.add({"model", side_car.model});
    table.add({"numbers learned", std::to_string(r.learned_numbers)});
    table.add({"steps", std::to_string(r.steps)});
    table.add({"time", duration(r.seconds)});
    table.add({"tokens/s", fixed(static_cast<double>(r.tokens) / r.seconds, 0)});
    table.add({"loss", fixed(r.loss, 4)});
    if (side_car.method == "roles") {
      table.add({"pairs alive", percent(r.pairs)});
      table.add({"lambda", fixed(r.lambda, 4)});
      for (const double budget : {0.5, 0.25, 0.12, 0.06}) {
        if (side_car.calibration.bias.empty()) break;
        table.add({"budget bias for " + percent(budget, 0),
                   fixed(side_car.calibration.bias_for(budget), 2)});
      }
    }
    if (dense_ms_ > 0) {
      const double ms = 1e3 * r.seconds / static_cast<double>(r.steps);
      table.add({"a step", fixed(ms, 0) + " ms, " + fixed(ms / dense_ms_, 2) +
                               "x a dense forward and backward pass"});
    }
    if (r.peak_device_bytes > 0) table.add({"peak GPU memory", bytes(r.peak_device_bytes)});
    std::fputs(table.text().c_str(), stdout);
  }

  Arguments& a_;
  CLI::App& command_;
  Context& context_;
  const train::FinetuneRecipe* recipe_ = nullptr;
  ModelFolder opened_;
  train::FinetuneText text_;
  double dense_ms_ = 0;
  const InterruptGuard guard_;
};

}  // namespace

void add_finetune(CLI::App& app, Context& context) {
  auto a = std::make_shared<Arguments>();
  auto self = std::make_shared<CLI::App*>();
  CLI::App& command =
      context.add(app, "finetune", "teach a frozen pretrained model which keys to keep",
                  [a, self, &context] { Run(*a, **self, context)(); });
  *self = &command;
  command
      .add_option("--model", a->model,
                  "model folder (Hugging Face's, or a dense one of nats-lm train), or a .gguf file")
      ->required()
      ->type_name("DIR|FILE");
  command
      .add_option("--weights-dtype", a->dtype,
                  "of a pretrained model's matrices; default: float32, on a GPU bfloat16")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command
      .add_option("--text", a->text,
                  "text files, folders or .jsonl; each is drawn from equally often")
      ->required()
      ->type_name("PATH");
  command.add_option("--carrier", a->carriers, "text that facts are planted in; default: --text")
      ->type_name("PATH");
  command.add_option("--out", a->out, "the side-car to write")->required()->type_name("FILE");
  command.add_flag("--resume", a->resume, "continue the stopped run with this --out");
  std::vector<std::string> recipes;
  for (const auto& recipe : train::finetune_recipes()) recipes.emplace_back(recipe.name);
  command
      .add_option("--recipe", a->recipe,
                  "set of defaults (those below are nats-lm's): published: the method's authors'")
      ->check(CLI::IsMember(recipes));
  command.add_option("--plain", a->plain, "how often a text is plain, beside the next two")
      ->check(CLI::Range(0.0, 1e6));
  command.add_option("--repeat", a->repeat, "how often a text repeats passages of itself")
      ->check(CLI::Range(0.0, 1e6));
  command.add_option("--facts", a->facts, "how often facts are planted and asked for")
      ->check(CLI::Range(0.0, 1e6));
  command
      .add_option("--calibration-texts", a->calibration_texts,
                  "held-out texts to measure budgets on; 0: no calibration")
      ->check(CLI::Range(0, 1 << 16));
  command
      .add_option("--calibration-range", a->calibration_range,
                  "budget biases that are measured lie up to this far from 0")
      ->check(CLI::Range(0.0, 1000.0));
  command.add_option("--calibration-points", a->calibration_points, "how many of them")
      ->check(CLI::Range(2, 1000));
  command
      .add_option("--compare-dense", a->compare_dense,
                  "afterwards time a dense forward and backward pass of a batch, so many times")
      ->check(CLI::Range(0, 1000));
  add_device_option(command, a->device);
  add_field_options(command, a->options);
  command.get_option("--lambda")->excludes(command.get_option("--pairs"));
}

}  // namespace natslm::cli
