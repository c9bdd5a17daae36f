// The written-out pass against Model::forward with autograd, on the CPU in float32, where both must
// compute the same; and in bfloat16, where they must be near.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/training_pass.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "natslm/models/models.h"
#include "natslm/roles/assignment.h"

namespace natslm::models {
namespace {

using at::Tensor;

struct Case {
  std::string name;
  roles::RoleSet set = roles::RoleSet::kGls;
  int32_t q_heads = 2, kv_heads = 2, chunk = 1;
  roles::GradientOptions role_gradient;
  bool detach_scores = false, biased = false;
  double lambda = 0.3;
};

Config config_of(const Case& c) {
  Config config;
  config.layers = 3;
  config.width = 32;
  config.q_heads = c.q_heads;
  config.kv_heads = c.kv_heads;
  config.head_dim = 16;
  config.hidden = 64;
  config.vocabulary = 50;
  config.context = 48;
  config.initial_deviation = 0.2;
  config.roles = {.set = c.set, .window = 4, .chunk = c.chunk};
  return config;
}

class Pass : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kBatch = 3, kTokens = 41;

  Pass() : model(make_model(config_of(GetParam()), 5)) {
    at::set_num_threads(1);  // too little work to share
    const Case& c = GetParam();
    const Tensor windows = at::randint(50, {kBatch, kTokens + 1}, at::kInt);
    tokens = windows.slice(1, 0, kTokens).contiguous();
    targets = windows.slice(1, 1).contiguous();
    input.sequences = at::tensor({7, 8, 2}, at::kLong);
    input.seed = 3;
    input.step = 11;
    input.detach_scores = c.detach_scores;
    input.role_gradient = c.role_gradient;
    if (c.biased) input.biases = at::linspace(-1, 1, kBatch);
  }

  // Loss (sum over tokens) and gradients of weight * loss + lambda * price by autograd.
  double by_autograd(double weight, double lambda) {
    for (const auto& [name, p] : model->parameters()) p.mutable_grad() = Tensor();
    models::TrainingInput whole = input;
    whole.tokens = tokens.to(at::kLong);
    const TrainingOutput out = model->forward(whole);
    const Tensor loss =
        -at::log_softmax(out.logits, -1).gather(-1, targets.to(at::kLong).unsqueeze(-1)).sum();
    Tensor total = loss * weight;
    if (out.price.defined() && out.price.requires_grad()) total = total + out.price * lambda;
    total.backward();
    sampled = out.sampled;
    argmax_kv_end = out.argmax_kv_end;
    return loss.item<double>();
  }

  PassOutput by_pass(TrainingPass& pass, PassGradients want) {
    models::TrainingInput split = input;
    split.tokens = tokens;
    want.price_weight = at::full({}, GetParam().lambda, at::kFloat);
    return pass.loss_and_gradients(split, targets, want);
  }

  // Largest difference of a gradient / largest entry of that gradient.
  void expect_gradients(TrainingPass& pass, double tolerance, double factor = 1) const {
    const auto& parameters = model->parameters();
    ASSERT_EQ(pass.gradients().size(), parameters.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      const auto& [name, p] = parameters[i];
      const Tensor expected = p.grad().defined() ? p.grad() * factor : at::zeros_like(p.detach());
      const double size = expected.abs().max().item<double>();
      const double off = (pass.gradients()[i] - expected).abs().max().item<double>();
      EXPECT_LE(off, tolerance * size + 1e-7) << name << ", largest entry " << size;
    }
  }

  std::unique_ptr<Model> model;
  Tensor tokens, targets;
  TrainingInput input;
  Shares sampled;
  double argmax_kv_end = 1;
};

TEST_P(Pass, ComputesWhatAutogradComputes) {
  const double weight = 1.0 / (kBatch * kTokens);
  const double loss = by_autograd(weight, GetParam().lambda);
  const auto pass = model->training_pass(at::kFloat);
  const PassOutput out = by_pass(*pass, {.loss_weight = weight});
  EXPECT_NEAR(out.loss.item<double>(), loss, 1e-4 * loss);
  expect_gradients(*pass, 2e-4);
  if (GetParam().set == roles::RoleSet::kDense) {
    EXPECT_FALSE(out.shares.defined());
    return;
  }
  EXPECT_NEAR(out.shares[roles::kPairs].item<double>(), sampled.pairs, 1e-6);
  EXPECT_NEAR(out.shares[roles::kKvEnd].item<double>(), sampled.kv_end, 1e-6);
  EXPECT_NEAR(out.shares[roles::kKvMean].item<double>(), sampled.kv_mean, 1e-6);
  EXPECT_NEAR(out.shares[roles::kArgmaxKvEnd].item<double>(), argmax_kv_end, 1e-6);
}

TEST_P(Pass, AddsToGradientsIfAsked) {
  by_autograd(1, GetParam().lambda);
  const auto pass = model->training_pass(at::kFloat);
  by_pass(*pass, {});
  by_pass(*pass, {.accumulate = true});
  expect_gradients(*pass, 2e-4, 2);
}

TEST_P(Pass, GivesTheGradientsOfOneKindAlone) {
  by_autograd(1, GetParam().lambda);
  for (const auto& [name, p] : model->parameters())
    if (!is_score_layer(name)) p.mutable_grad() = Tensor();
  const auto scores = model->training_pass(at::kFloat);
  by_pass(*scores, {.weights = false});
  expect_gradients(*scores, 2e-4);

  // Of the weights with roles that are drawn but not learned of.
  input.learn_roles = false;
  by_autograd(1, 0);
  const auto weights = model->training_pass(at::kFloat);
  by_pass(*weights, {.scores = false});
  expect_gradients(*weights, 2e-4);
}

TEST_P(Pass, WithoutGradientsTheLossIsTheSame) {
  input.sample = false;
  const double loss = by_autograd(1, 0);
  const auto pass = model->training_pass(at::kFloat);
  TrainingInput split = input;
  split.tokens = tokens;
  const PassOutput out = pass->loss(split, targets);
  EXPECT_NEAR(out.loss.item<double>(), loss, 1e-4 * loss);
  for (const Tensor& gradient : pass->gradients())
    EXPECT_EQ(gradient.abs().max().item<double>(), 0);
  if (out.shares.defined()) {
    EXPECT_NEAR(out.shares[roles::kKvEnd].item<double>(), sampled.kv_end, 1e-6);
  }
}

TEST_P(Pass, InBFloat16TheLossIsNear) {
  const double loss = by_autograd(1, 0);
  const auto pass = model->training_pass(at::kBFloat16);
  const PassOutput out = by_pass(*pass, {});
  // A role that rounding turns changes the loss of some tokens, hence not tighter.
  EXPECT_NEAR(out.loss.item<double>(), loss, 2e-2 * loss);
}

TEST_P(Pass, SeesWeightsOnlyWhenToldTo) {
  const auto pass = model->training_pass(at::kFloat);
  const double before = by_pass(*pass, {}).loss.item<double>();
  for (const auto& [name, p] : model->parameters())
    if (name.ends_with("mlp.in.weight")) p.detach().mul_(3);
  EXPECT_EQ(by_pass(*pass, {}).loss.item<double>(), before);
  pass->load_weights();
  EXPECT_NE(by_pass(*pass, {}).loss.item<double>(), before);
}

const Case kCases[] = {
    {.name = "dense", .set = roles::RoleSet::kDense},
    {.name = "denseGrouped", .set = roles::RoleSet::kDense, .q_heads = 4, .kv_heads = 2},
    {.name = "gls"},
    {.name = "gs", .set = roles::RoleSet::kGs},
    {.name = "grouped", .q_heads = 4, .kv_heads = 1},
    {.name = "chunks", .chunk = 4},
    {.name = "detached", .detach_scores = true},
    {.name = "biased", .biased = true},
    {.name = "endTermUnlimited", .role_gradient = {.limit_factor = false, .end_term = true}},
    {.name = "causalNormalizer", .role_gradient = {.causal_normalizer = true}},
    {.name = "free", .lambda = 0},
};
INSTANTIATE_TEST_SUITE_P(Models, Pass, ::testing::ValuesIn(kCases),
                         [](const auto& one) { return one.param.name; });

}  // namespace
}  // namespace natslm::models
