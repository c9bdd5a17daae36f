// Fine-tuning a frozen model: only what was added changes, the loss and its gradient are those that
// a plain computation gives, and a stopped run goes on as if it had not been.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/finetune.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/kl_div.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/models/models.h"
#include "natslm/train/finetune_loss.h"
#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"
#include "tests/support/small_config.h"

namespace natslm::train {
namespace {

using at::Tensor;
using test::error_of;
using test::ScratchFolder;

constexpr int64_t kContext = 48;

models::Config small(roles::RoleSet set) {
  models::Config c = test::small_sizes("llama");
  c.context = kContext;
  c.roles = {.set = set, .window = 4, .chunk = 1};
  return test::completed(c);
}

// As a pretrained model is opened: frozen but for its score layers.
std::unique_ptr<models::Model> frozen(roles::RoleSet set = roles::RoleSet::kGls) {
  auto model = models::make_model(small(set), 3);
  for (const auto& [name, tensor] : model->parameters())
    if (!models::is_score_layer(name)) Tensor(tensor).requires_grad_(false);
  return model;
}

// Repetitive text, half of whose tokens count.
void sample(int64_t number, std::span<int32_t> tokens, std::span<float> weights) {
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(mix64(static_cast<uint64_t>(number) * 7 + i % 11) % 61);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = i % 2 == 0 ? 0.0f : 1.0f;
}

FinetuneOptions few_steps() {
  FinetuneOptions o;
  o.steps = 6;
  o.batch = 4;
  o.context = kContext;
  o.window = 4;
  o.warm_up = 2;
  o.log_every = 2;
  o.checkpoint_every = 0;
  return o;
}

Tensor parameter(const models::Model& model, const std::string& name) {
  for (const auto& [known, tensor] : model.parameters())
    if (known == name) return tensor;
  return {};
}

std::vector<Tensor> copies(const models::Model& model) {
  std::vector<Tensor> all;
  for (const auto& [name, tensor] : model.parameters()) all.push_back(tensor.detach().clone());
  return all;
}

TEST(FineTuner, ChangesTheScoreLayersAndNothingElse) {
  const ScratchFolder folder;
  const auto model = frozen();
  const std::vector<Tensor> before = copies(*model);
  FineTuner tuner(*model, sample, few_steps(), folder / "run", {});
  const FinetuneResult result = tuner.run();
  EXPECT_EQ(result.steps, 6);
  EXPECT_EQ(result.tokens, 6 * 4 * kContext);
  EXPECT_EQ(result.learned_numbers, 2 * 6 * 32);
  for (size_t i = 0; i < before.size(); ++i) {
    const auto& [name, tensor] = model->parameters()[i];
    EXPECT_EQ(at::equal(tensor, before[i]), !models::is_score_layer(name)) << name;
  }
}

TEST(FineTuner, KeepsFewerKeysTheMoreTheyCost) {
  const ScratchFolder folder;
  const auto pairs_at = [&](double lambda) {
    const auto model = frozen();
    FinetuneOptions o = few_steps();
    o.steps = 40;
    o.lambda = lambda;
    o.learning_rate = 0.1;
    o.bias_range = 0;
    return FineTuner(*model, sample, o, folder / std::to_string(lambda), {}).run().pairs;
  };
  const double cheap = pairs_at(1e-6), dear = pairs_at(30);
  EXPECT_LT(dear, 0.8 * cheap);
}

TEST(FineTuner, SteersThePriceTowardsTheAskedShareOfPairs) {
  const ScratchFolder folder;
  const auto model = frozen();
  FinetuneOptions o = few_steps();
  o.steps = 150;
  o.pairs = 0.4;
  o.bias_range = 3;
  o.price_slope = 0;
  o.control_start = 0.1;
  o.learning_rate = 0.05;
  const FinetuneResult result = FineTuner(*model, sample, o, folder / "run", {}).run();
  EXPECT_NEAR(result.pairs, 0.4, 0.06);
}

TEST(FineTuner, ARunThatWasStoppedEndsAsTheOneThatWasNot) {
  const ScratchFolder folder;
  const auto whole = frozen(), parts = frozen();
  const FinetuneOptions o = few_steps();
  FineTuner(*whole, sample, o, folder / "whole", {}).run();
  int64_t asked = 0;
  FinetuneParts stop;
  stop.stop = [&] { return ++asked > 3; };
  EXPECT_TRUE(FineTuner(*parts, sample, o, folder / "parts", stop).run().stopped);
  const auto again = frozen();
  FineTuner tuner(*again, sample, o, folder / "parts", {});
  ASSERT_TRUE(tuner.resume());
  EXPECT_EQ(tuner.steps_done(), 3);
  EXPECT_FALSE(tuner.run().stopped);
  for (size_t i = 0; i < whole->parameters().size(); ++i)
    EXPECT_TRUE(at::equal(whole->parameters()[i].second, again->parameters()[i].second))
        << whole->parameters()[i].first;
}

TEST(FineTuner, AFinishedRunIsResumedAtItsEndWithTheSameResult) {
  const ScratchFolder folder;
  const auto model = frozen(), again = frozen();
  const FinetuneResult result = FineTuner(*model, sample, few_steps(), folder / "run", {}).run();
  FineTuner tuner(*again, sample, few_steps(), folder / "run", {});
  ASSERT_TRUE(tuner.resume());
  const FinetuneResult resumed = tuner.run();
  EXPECT_EQ(resumed.steps, result.steps);
  EXPECT_EQ(resumed.loss, result.loss);
  EXPECT_EQ(resumed.pairs, result.pairs);
  EXPECT_EQ(resumed.lambda, result.lambda);
  for (size_t i = 0; i < model->parameters().size(); ++i)
    EXPECT_TRUE(at::equal(model->parameters()[i].second, again->parameters()[i].second));
}

TEST(FineTuner, RefusesToGoOnWithOtherOptionsOrOtherTexts) {
  const ScratchFolder folder;
  const auto model = frozen();
  int64_t asked = 0;
  FinetuneParts parts{.identity = "these texts"};
  parts.stop = [&] { return ++asked > 1; };
  FineTuner(*model, sample, few_steps(), folder / "run", parts).run();
  FinetuneOptions other = few_steps();
  other.learning_rate = 0.5;
  EXPECT_NE(error_of([&] {
              FineTuner(*model, sample, other, folder / "run", parts).resume();
            }).find("--lr is 0.5"),
            std::string::npos);
  EXPECT_NE(
      error_of([&] {
        FineTuner(*model, sample, few_steps(), folder / "run", {.identity = "others"}).resume();
      }).find("other texts"),
      std::string::npos);
}

TEST(FineTuner, MicroBatchesAddUpToTheWholeBatch) {
  const ScratchFolder folder;
  const auto learned = [&](int64_t micro_batch, bool recompute) {
    const auto model = frozen();
    FinetuneOptions o = few_steps();
    o.steps = 1;
    o.micro_batch = micro_batch;
    o.recompute = recompute;
    o.learning_rate = 1e-3;
    FineTuner(*model, sample, o, folder / "run", {}).run();
    return parameter(*model, "layers.0.attention.roles.weight").grad().clone();
  };
  const Tensor whole = learned(0, false), quarters = learned(1, false), again = learned(0, true);
  const double size = whole.abs().max().item<double>();
  EXPECT_GT(size, 0);
  EXPECT_LT((whole - quarters).abs().max().item<double>(), 1e-5 * size);
  EXPECT_LT((whole - again).abs().max().item<double>(), 1e-5 * size) << "recomputed activations";
}

TEST(FineTuner, EveryLossFallsAndTheOnesTowardsTheDenseModelAreNoughtWithEveryKey) {
  const ScratchFolder folder;
  for (const char* loss : {kCrossEntropy, kToDense, kBothLosses, kHiddenError}) {
    const auto model = frozen();
    FinetuneOptions o = few_steps();
    o.loss = loss;
    o.steps = 30;
    o.lambda = 1e-9;
    o.learning_rate = 0.1;
    o.bias_range = 0;
    std::vector<double> losses;
    FinetuneParts parts;
    parts.on_step = [&](const StepReport& r) { losses.push_back(r.loss); };
    FineTuner(*model, sample, o, folder / loss, parts).run();
    EXPECT_TRUE(std::isfinite(losses.back())) << loss;
    if (std::string(loss) != kCrossEntropy && std::string(loss) != kBothLosses) {
      // Memory is free, so all there is to learn is to keep what matters.
      EXPECT_LT(losses.back(), losses.front()) << loss;
    }
  }
  // Every key of a Global-only model lives: it is its own dense model.
  const auto model = frozen(roles::RoleSet::kGl);
  {
    const c10::NoGradGuard no_grad;
    for (const auto& [name, tensor] : model->parameters())
      if (models::is_score_layer(name)) Tensor(tensor).zero_();
  }
  Tensor tokens = at::arange(kContext, at::kLong).remainder(61).unsqueeze(0);
  models::TrainingInput input;
  input.tokens = tokens;
  input.sample = false;
  const Tensor hidden = model->forward(input).hidden;
  const Tensor weights = at::zeros({1, kContext}, at::kFloat) + 1;
  for (const char* loss : {kToDense, kHiddenError}) {
    const RowsLoss rows = rows_loss(*model, loss, hidden, hidden, tokens, weights);
    EXPECT_NEAR(rows.loss.item<double>(), 0, 1e-5) << loss;
    EXPECT_LT(rows.gradient.abs().max().item<double>(), 1e-5) << loss;
  }
}

TEST(RowsLoss, IsWhatAutogradMakesOfItsDefinition) {
  const auto model = frozen();
  const Tensor teacher = at::randn({2, kContext, 32}), weights = at::rand({2, kContext});
  Tensor(weights).narrow(1, 3, 9).zero_();
  const Tensor targets = (at::rand({2, kContext}) * 61).to(at::kLong);
  for (const std::string loss : {kCrossEntropy, kToDense, kBothLosses, kHiddenError}) {
    const Tensor hidden = at::randn({2, kContext, 32}).requires_grad_(true);
    const Tensor log_p = at::log_softmax(model->output(hidden), -1),
                 log_dense = at::log_softmax(model->output(teacher), -1).detach();
    Tensor each = at::zeros({2, kContext});
    if (loss == kCrossEntropy || loss == kBothLosses)
      each = each - log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1);
    if (loss == kToDense || loss == kBothLosses)
      each = each + (log_dense.exp() * (log_dense - log_p)).sum(-1);
    if (loss == kHiddenError) each = (hidden - teacher).square().mean(-1);
    const Tensor total = (each * weights).sum();
    torch::autograd::backward({total}, {});
    const RowsLoss rows = rows_loss(*model, loss, hidden, teacher, targets, weights);
    EXPECT_NEAR(rows.loss.item<double>(), total.item<double>(),
                1e-5 * std::abs(total.item<double>()))
        << loss;
    const double size = hidden.grad().abs().max().item<double>();
    EXPECT_LT((rows.gradient - hidden.grad()).abs().max().item<double>(), 1e-5 * size) << loss;
  }
}

TEST(FineTuner, AnAdapterHasAtLeastAsManyNumbersAndNoKeyDies) {
  const ScratchFolder folder;
  const auto model = frozen(roles::RoleSet::kDense);
  add_adapters(*model, 1);
  FinetuneOptions o = few_steps();
  o.method = kAdapterMethod;
  std::vector<double> losses;
  FinetuneParts parts;
  parts.on_step = [&](const StepReport& r) { losses.push_back(r.loss); };
  o.steps = 40;
  // The same four texts again and again, so that there is something to learn.
  const TextSamples few = [](int64_t number, std::span<int32_t> tokens, std::span<float> weights) {
    sample(number % 4, tokens, weights);
  };
  const FinetuneResult result = FineTuner(*model, few, o, folder / "run", parts).run();
  EXPECT_GE(result.learned_numbers, 2 * 6 * 32);
  EXPECT_LT(result.learned_numbers, 2 * (6 * 32 + 64));
  EXPECT_EQ(result.pairs, 1);
  EXPECT_LT(losses.back(), losses.front());
}

TEST(FineTuner, WrongOptionsAreErrorsThatNameTheValue) {
  const auto refused = [](auto change) {
    FinetuneOptions o = few_steps();
    change(o);
    return error_of([&] { check(o); });
  };
  EXPECT_NE(refused([](auto& o) { o.loss = "mae"; }).find("--loss is mae"), std::string::npos);
  EXPECT_NE(refused([](auto& o) { o.method = "duo"; }).find("--method is duo"), std::string::npos);
  EXPECT_NE(refused([](auto& o) { o.window = -1; }).find("--window is -1"), std::string::npos);
  EXPECT_NE(refused([](auto& o) { o.pairs = 1.5; }).find("--pairs is 1.5"), std::string::npos);
  EXPECT_NE(refused([](auto& o) { o.micro_batch = 3; }).find("--micro-batch is 3"),
            std::string::npos);
  EXPECT_NE(error_of([] { finetune_recipe("magic"); }).find("published"), std::string::npos);
}

TEST(Calibration, FallsWithTheBiasAndIsWhatTheModelKeeps) {
  const auto model = frozen();
  std::vector<int32_t> texts(3 * kContext);
  for (size_t i = 0; i < texts.size(); ++i) texts[i] = static_cast<int32_t>(mix64(i) % 61);
  const std::vector<float> biases = calibration_biases(0.2, 4);
  ASSERT_EQ(biases.size(), 5u) << "0 is always among them";
  const roles::Calibration calibration = calibrate(*model, texts, kContext, biases);
  EXPECT_EQ(calibration.bias, biases);
  EXPECT_LT(calibration.kv_end.back(), calibration.kv_end.front());
  for (size_t i = 1; i < biases.size(); ++i)
    EXPECT_LE(calibration.kv_end[i], calibration.kv_end[i - 1]);
  double sum = 0;
  for (const float share : calibration.layer_shares) sum += share;
  EXPECT_NEAR(sum, 1, 1e-6);
  models::TrainingInput input;
  input.tokens = at::from_blob(texts.data(), {3, kContext}, at::kInt).to(at::kLong);
  input.sample = false;
  input.bias = biases[1];
  EXPECT_NEAR(model->forward(input).sampled.kv_end, calibration.kv_end[1], 1e-6);
}

}  // namespace
}  // namespace natslm::train
