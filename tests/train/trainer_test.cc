// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/trainer.h"

#include <ATen/ops/equal.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/train/adamw.h"
#include "tests/support/one_thread.h"
#include "tests/train/tiny_run.h"

namespace natslm::train {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::vector<float> weights(const models::Model& model) {
  std::vector<float> all;
  for (const auto& [name, tensor] : model.parameters()) {
    const float* data = tensor.const_data_ptr<float>();
    all.insert(all.end(), data, data + tensor.numel());
  }
  return all;
}

std::vector<nlohmann::json> log_lines(const fs::path& folder) {
  std::istringstream text(read_file(folder / "log.jsonl"));
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

class Recorder : public Observer {
 public:
  void on_step(const StepReport& r) override { steps.push_back(r); }
  void on_validation(int64_t step, const Validation&) override { validations.push_back(step); }
  void on_checkpoint(int64_t step, const fs::path&) override { checkpoints.push_back(step); }
  std::vector<StepReport> steps;
  std::vector<int64_t> validations, checkpoints;
};

TEST(Trainer, FollowsTheRecordedTrajectory) {
  const ScratchFolder folder;
  TinyRun run;
  run.options.steps = 60;
  run.options.kv_budget = 0;
  run.options.lambda = 0.1;
  Recorder recorder;
  run.parts.observer = &recorder;
  run.trainer(folder.path()).run();
  // Recorded from this program. Rounding differs between machines, hence the tolerance; a wrong
  // rate, clip, decay or loss moves these by far more.
  const std::pair<int, double> recorded[] = {
      {0, 2.569305}, {9, 2.521120}, {29, 2.342296}, {59, 2.191285}};
  for (const auto& [step, loss] : recorded)
    EXPECT_NEAR(recorder.steps[static_cast<size_t>(step)].loss, loss, 1e-4) << "step " << step;
}

TEST(Trainer, AccumulatedMicroBatchesEqualOneBatch) {
  const ScratchFolder a, b;
  TinyRun whole, parts;
  parts.options.micro_batch = 1;
  Recorder one, four;
  whole.parts.observer = &one;
  parts.parts.observer = &four;
  whole.trainer(a.path()).run();
  parts.trainer(b.path()).run();
  for (size_t i = 0; i < one.steps.size(); ++i) {
    EXPECT_NEAR(one.steps[i].loss, four.steps[i].loss, 1e-5);
    EXPECT_NEAR(one.steps[i].gradient_norm, four.steps[i].gradient_norm, 1e-4);
    EXPECT_NEAR(one.steps[i].kv_end, four.steps[i].kv_end, 1e-5);
  }
  const auto w = weights(whole.model), p = weights(parts.model);
  for (size_t i = 0; i < w.size(); ++i) ASSERT_NEAR(w[i], p[i], 2e-4) << "weight " << i;
}

TEST(Trainer, AStepDescendsLossPlusLambdaTimesPrice) {
  // One step of plain size, against the gradient of loss + lambda * price by differences.
  const auto total = [](TinyRun& run) {
    at::Tensor windows = at::zeros({4, 17}, at::kInt);
    models::TrainingInput input;
    input.sequences = at::zeros({4}, at::kLong);
    run.dataset.fill(0, 4, 16, windows.mutable_data_ptr<int32_t>(),
                     input.sequences.mutable_data_ptr<int64_t>());
    const at::Tensor ids = windows.to(at::kLong);
    input.tokens = ids.slice(1, 0, 16).contiguous();
    const auto out = run.model.forward(input);
    const at::Tensor logits = out.logits.detach().to(at::kDouble);
    const at::Tensor loss =
        (logits.logsumexp(-1, true) - logits.gather(-1, ids.slice(1, 1).unsqueeze(-1))).mean();
    return loss.item<double>() + run.options.lambda * out.price.item<double>();
  };
  const ScratchFolder folder;
  TinyRun run;
  run.options.steps = 1;
  run.options.kv_budget = 0;
  run.options.lambda = 3;
  run.options.clip = 0;
  run.options.warm_up = 0;
  run.options.learning_rate = 1e-9;  // the weights stay where the differences are taken
  run.trainer(folder.path()).run();
  for (const auto& [name, parameter] : run.model.parameters()) {
    ASSERT_TRUE(parameter.grad().defined()) << name;
    float* value = at::Tensor(parameter).mutable_data_ptr<float>();
    const float before = *value, h = 1e-2f;
    *value = before + h;
    const double up = total(run);
    *value = before - h;
    const double down = total(run);
    *value = before;
    EXPECT_NEAR(*parameter.grad().const_data_ptr<float>(), (up - down) / (2 * h), 3e-4) << name;
  }
}

TEST(Trainer, AlternatingTrainsWeightsOnOneHalfAndRolesOnTheOther) {
  const ScratchFolder folder;
  TinyRun run;
  run.options.optimize = kAlternating;
  run.options.steps = 1;
  run.options.kv_budget = 0;
  run.options.lambda = 3;
  run.options.clip = 0;
  run.options.warm_up = 0;
  run.options.learning_rate = 1e-9;
  run.trainer(folder.path()).run();

  // Gradient of mean loss + lambda * price of two of the four sequences.
  TinyModel model;
  const auto gradient = [&](int64_t first, double lambda, const std::string& name) {
    at::Tensor windows = at::zeros({2, 17}, at::kInt);
    models::TrainingInput input;
    input.sequences = at::zeros({2}, at::kLong);
    run.dataset.fill_samples(first, 2, 16, windows.mutable_data_ptr<int32_t>(),
                             input.sequences.mutable_data_ptr<int64_t>());
    const at::Tensor ids = windows.to(at::kLong);
    input.tokens = ids.slice(1, 0, 16).contiguous();
    const auto out = model.forward(input);
    const at::Tensor loss =
        (out.logits.logsumexp(-1, true) - out.logits.gather(-1, ids.slice(1, 1).unsqueeze(-1)))
            .mean();
    for (const auto& [other, p] : model.parameters()) p.mutable_grad() = at::Tensor();
    (loss + out.price * lambda).backward();
    for (const auto& [other, p] : model.parameters())
      if (other == name) return p.grad();
    return at::Tensor();
  };
  for (const auto& [name, p] : run.model.parameters()) {
    const bool score = models::is_score_layer(name);
    const at::Tensor expected = score ? gradient(2, 3, name) : gradient(0, 0, name);
    EXPECT_LT((p.grad() - expected).abs().max().item<double>(), 1e-6) << name;
  }
}

TEST(Trainer, GradientsLongerThanTheClipAreCutToIt) {
  const ScratchFolder a, b;
  TinyRun clipped, free;
  clipped.options.steps = free.options.steps = 1;
  clipped.options.clip = 1e-3;
  free.options.clip = 0;
  Recorder recorder;
  clipped.parts.observer = &recorder;
  clipped.trainer(a.path()).run();
  free.trainer(b.path()).run();
  EXPECT_GT(recorder.steps[0].gradient_norm, 1e-2) << "the norm before clipping is reported";
  EXPECT_NEAR(gradient_norm(clipped.model.parameters()), 1e-3, 1e-6);
  EXPECT_NEAR(gradient_norm(free.model.parameters()), recorder.steps[0].gradient_norm, 1e-6);
}

TEST(Trainer, ScoreLayersMayLearnAtARateOfTheirOwn) {
  const ScratchFolder a, b;
  TinyRun plain, fast;
  plain.options.steps = fast.options.steps = 1;
  fast.options.role_rate = 4;
  const auto before = plain.model.parameters()[3].second.detach().clone();
  plain.trainer(a.path()).run();
  fast.trainer(b.path()).run();
  for (size_t i = 0; i < plain.model.parameters().size(); ++i) {
    const auto& [name, p] = plain.model.parameters()[i];
    const at::Tensor& q = fast.model.parameters()[i].second;
    if (name != "roles.weight") {
      EXPECT_TRUE(at::equal(p, q)) << name;
      continue;
    }
    // The first update of AdamW is of the rate's size, decay included.
    const at::Tensor moved = p.detach() - before, moved_fast = q.detach() - before;
    EXPECT_LT((moved_fast - 4 * moved).abs().max().item<float>(), 1e-6) << name;
  }
}

TEST(Trainer, BudgetControlRaisesLambdaWhileTooManyKeysLiveAndLowersItAfter) {
  const ScratchFolder folder;
  TinyRun run;
  run.options.steps = 300;
  Recorder recorder;
  run.parts.observer = &recorder;
  run.trainer(folder.path()).run();
  const auto& steps = recorder.steps;
  EXPECT_DOUBLE_EQ(steps[0].lambda, run.options.control_start);
  double highest = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    highest = std::max(highest, steps[i].lambda);
    if (i < 50) {
      ASSERT_GT(steps[i].kv_end, run.options.kv_budget) << "step " << i;
      ASSERT_GT(steps[i + 1].lambda, steps[i].lambda) << "step " << i;
    }
  }
  EXPECT_LT(steps.back().kv_end, run.options.kv_budget);
  EXPECT_LT(steps.back().lambda, highest);
}

TEST(Trainer, ADenseModelHasNoPriceAndNoLambda) {
  const ScratchFolder folder;
  TinyRun run(/*dense=*/true);
  const Result result = run.trainer(folder.path()).run();
  EXPECT_EQ(result.lambda, 0);
  EXPECT_EQ(result.shares.kv_end, 1);
  EXPECT_EQ(result.shares.pairs, 1);
}

TEST(Trainer, LogsEveryIntervalAndTheResultLast) {
  const ScratchFolder folder;
  TinyRun run;
  run.parts.validate = [] { return Validation{12.5, {0.1, 0.2, 0.3}}; };
  run.options.validate_every = 10;
  Recorder recorder;
  run.parts.observer = &recorder;
  const Result result = run.trainer(folder.path()).run();
  EXPECT_THAT(recorder.validations, ElementsAre(10, 20));
  EXPECT_THAT(recorder.checkpoints, ElementsAre(20));
  const auto lines = log_lines(folder.path());
  ASSERT_EQ(lines.size(), 4 + 2 + 1);
  EXPECT_EQ(lines[0]["step"], 5);
  double mean = 0;
  for (int i = 0; i < 5; ++i) mean += recorder.steps[i].loss / 5;
  EXPECT_NEAR(lines[0]["loss"].get<double>(), mean, 1e-12);
  const auto& last = lines.back();
  for (const char* field : {"steps", "tokens", "tokens_per_s", "loss", "validation_perplexity",
                            "kv_end", "kv_mean", "pairs", "lambda", "peak_bytes"})
    EXPECT_TRUE(last.contains(field) && last[field].is_number()) << field;
  EXPECT_EQ(last["tokens"], 20 * 4 * 16);
  EXPECT_EQ(last["kv_end"], 0.2);
  EXPECT_EQ(result.validation_perplexity, 12.5);
}

TEST(Trainer, AResumedRunEndsWithTheSameBits) {
  const ScratchFolder whole_folder, folder;
  TinyRun whole;
  whole.options.checkpoint_every = 7;
  whole.trainer(whole_folder.path()).run();
  for (const int64_t stop_at : {1, 6, 7, 8, 19}) {
    fs::remove_all(folder.path());
    std::atomic<bool> stop = false;
    {
      TinyRun first;
      first.options.checkpoint_every = 7;
      struct Stopper : Observer {
        void on_step(const StepReport& r) override { *stop = r.step == at; }
        std::atomic<bool>* stop;
        int64_t at;
      } stopper;
      stopper.stop = &stop;
      stopper.at = stop_at;
      first.parts.observer = &stopper;
      first.parts.stop = [&] { return stop.load(); };
      const Result result = first.trainer(folder.path()).run();
      EXPECT_TRUE(result.stopped);
      EXPECT_EQ(result.steps, stop_at);
    }
    TinyRun second;
    second.options.checkpoint_every = 7;
    // Nothing of the first weights may survive the resume.
    for (const auto& [name, p] : second.model.parameters()) p.detach().fill_(0.5);
    Trainer trainer = second.trainer(folder.path());
    trainer.resume(Checkpoints(checkpoint_folder(folder.path()), 2).latest());
    EXPECT_EQ(trainer.steps_done(), stop_at);
    trainer.run();
    EXPECT_EQ(weights(second.model), weights(whole.model)) << "stopped at step " << stop_at;
    for (const char* file : {"model.safetensors", "optimizer.safetensors", "config.json"}) {
      const fs::path last = fs::path("checkpoints") / "step-000020" / file;
      EXPECT_EQ(read_file(folder.path() / last), read_file(whole_folder.path() / last)) << file;
    }
    // Each logged step once, whatever was logged before the stop.
    std::vector<int64_t> steps;
    for (const auto& line : log_lines(folder.path()))
      if (line.contains("step")) steps.push_back(line["step"]);
    EXPECT_THAT(steps, ElementsAre(5, 10, 15, 20)) << "stopped at step " << stop_at;
  }
}

TEST(Trainer, ResumingAFinishedRunChangesNothing) {
  const ScratchFolder folder;
  TinyRun run;
  const Result first = run.trainer(folder.path()).run();
  const auto before = weights(run.model);
  TinyRun again;
  Trainer trainer = again.trainer(folder.path());
  trainer.resume(folder.path() / "checkpoints" / "step-000020");
  const Result second = trainer.run();
  EXPECT_EQ(weights(again.model), before);
  EXPECT_FALSE(second.stopped);
  EXPECT_EQ(second.loss, first.loss);
  EXPECT_EQ(second.shares.kv_end, first.shares.kv_end);
}

TEST(Trainer, ResumingWithAnotherOptionThatMattersNamesIt) {
  const ScratchFolder folder;
  TinyRun run;
  run.parts.identity = {{"text", "abc"}};
  run.trainer(folder.path()).run();
  const fs::path checkpoint = folder.path() / "checkpoints" / "step-000020";
  const auto resume_with = [&](auto change) {
    TinyRun other;
    other.parts.identity = {{"text", "abc"}};
    change(other);
    other.trainer(folder.path()).resume(checkpoint);
  };
  EXPECT_THAT([&] { resume_with([](TinyRun& r) { r.options.learning_rate = 0.5; }); },
              ThrowsMessage<Error>(AllOf(HasSubstr("--lr is 0.5"), HasSubstr("has 0.01"))));
  EXPECT_THAT([&] { resume_with([](TinyRun& r) { r.options.steps = 21; }); },
              ThrowsMessage<Error>(HasSubstr("--steps is 21")));
  EXPECT_THAT([&] { resume_with([](TinyRun& r) { r.options.seed = 8; }); },
              ThrowsMessage<Error>(HasSubstr("--seed is 8")));
  EXPECT_THAT([&] { resume_with([](TinyRun& r) { r.parts.identity["text"] = "abd"; }); },
              ThrowsMessage<Error>(AllOf(HasSubstr("text is \"abd\""), HasSubstr("has \"abc\""))));
  EXPECT_NO_THROW(resume_with([](TinyRun& r) { r.options.log_every = 1; }));
  EXPECT_NO_THROW(resume_with([](TinyRun& r) { r.options.keep_checkpoints = 5; }));
}

TEST(Trainer, StopsAtALossThatIsNotFiniteAndNamesTheStepAndTheTensor) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const ScratchFolder folder;
    TinyRun run;
    run.options.checkpoint_every = 5;
    run.model.poison_step = 12;
    run.model.poison = poison;
    EXPECT_THAT([&] { run.trainer(folder.path()).run(); },
                ThrowsMessage<Error>(AllOf(HasSubstr("step 13: the loss is nan"),
                                           HasSubstr("the gradient of embedding.weight"),
                                           HasSubstr("checkpoints/step-000010"))));
    // The checkpoint is whole, and the run continues from it.
    TinyRun again;
    again.options.checkpoint_every = 5;
    Trainer trainer = again.trainer(folder.path());
    trainer.resume(Checkpoints(checkpoint_folder(folder.path()), 2).latest());
    EXPECT_EQ(trainer.steps_done(), 10);
    EXPECT_EQ(trainer.run().steps, 20);
  }
}

TEST(Trainer, NamesAWeightThatIsNotFinite) {
  const ScratchFolder folder;
  TinyRun run;
  run.model.parameters()[2].second.detach()[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT([&] { run.trainer(folder.path()).run(); },
              ThrowsMessage<Error>(AllOf(HasSubstr("step 1:"), HasSubstr("the weight hidden.bias"),
                                         HasSubstr("no checkpoint was written yet"))));
}

TEST(Trainer, AGradientWhoseSquareOverflowsIsClippedNotFatal) {
  const ScratchFolder folder;
  TinyRun run;
  run.options.steps = 1;
  run.model.poison_step = 0;
  run.model.poison = 1e25f;
  run.trainer(folder.path()).run();
  EXPECT_FALSE(find_non_finite(run.model.parameters()));
}

TEST(Trainer, LogitsThatTheModelStillNeedsAreNotOverwrittenSilently) {
  const ScratchFolder folder;
  TinyRun run;
  run.model.output_is_saved = true;
  EXPECT_ANY_THROW(run.trainer(folder.path()).run());
}

TEST(Trainer, RefusesATextShorterThanAWindowAndAContextTheModelLacks) {
  const ScratchFolder folder;
  TinyRun run;
  const data::TokenDataset short_text(tiny_text(16), TinyModel::kVocabulary, 1);
  EXPECT_THAT(
      [&] { Trainer(run.model, short_text, run.options, folder.path(), {}); },
      ThrowsMessage<Error>(HasSubstr("the text has 16 tokens, fewer than one window of 17")));
  run.options.context = 65;
  EXPECT_THAT([&] { run.trainer(folder.path()); },
              ThrowsMessage<Error>(HasSubstr("--context is 65")));
}

TEST(Options, EachOneOutOfRangeIsNamed) {
  const auto message = [](auto change) {
    Options o = tiny_options();
    change(o);
    try {
      check(o);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(message([](Options&) {}), "");
  EXPECT_THAT(message([](Options& o) { o.steps = 0; }), HasSubstr("--steps is 0"));
  EXPECT_THAT(message([](Options& o) { o.micro_batch = 3; }), HasSubstr("must divide --batch"));
  EXPECT_THAT(message([](Options& o) { o.learning_rate = std::nan(""); }),
              HasSubstr("--lr is nan"));
  EXPECT_THAT(message([](Options& o) { o.learning_rate = -1; }), HasSubstr("--lr is -1"));
  EXPECT_THAT(message([](Options& o) { o.role_rate = 0; }), HasSubstr("--role-lr is 0"));
  EXPECT_THAT(message([](Options& o) { o.kv_budget = 1.5; }), HasSubstr("--kv-budget is 1.5"));
  EXPECT_THAT(message([](Options& o) { o.beta2 = 1; }), HasSubstr("--beta2 is 1"));
  EXPECT_THAT(message([](Options& o) { o.clip = INFINITY; }), HasSubstr("--clip is inf"));
  EXPECT_THAT(message([](Options& o) { o.keep_checkpoints = 0; }),
              HasSubstr("--keep-checkpoints is 0"));
}

}  // namespace
}  // namespace natslm::train
