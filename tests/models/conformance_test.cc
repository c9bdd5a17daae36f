// What every architecture of the table must do, tried on a small random instance of each.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/models/models.h"
#include "tests/models/through_cache.h"
#include "tests/support/small_config.h"

namespace natslm::models {
namespace {

using at::Tensor;

constexpr uint64_t kSeed = 20260711;

Config small_config(std::string_view architecture, roles::RoleSet set) {
  Config c = test::small_sizes(architecture);
  c.roles = {.set = set, .window = 5, .chunk = 1};
  return test::completed(c);
}

Tensor random_tokens(int64_t batch, int64_t tokens, const Config& config, uint64_t seed = kSeed) {
  Tensor ids = at::empty({batch, tokens}, at::kLong);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    ids.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(
        mix64(seed + static_cast<uint64_t>(i)) % static_cast<uint64_t>(config.vocabulary));
  }
  return ids;
}

double worst_difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a - b).abs().max().item<double>();
}

TrainingOutput argmax_forward(Model& model, const Tensor& tokens, float bias = 0) {
  const c10::NoGradGuard no_grad;
  TrainingInput input;
  input.tokens = tokens;
  input.sample = false;
  input.bias = bias;
  return model.forward(input);
}

class EveryModel : public ::testing::TestWithParam<std::string> {
 protected:
  Config config(roles::RoleSet set = roles::RoleSet::kGls) const {
    return small_config(GetParam(), set);
  }
};

TEST_P(EveryModel, ReadsAPromptTheSameWayAtOnceInChunksAndTokenByToken) {
  for (const auto set :
       {roles::RoleSet::kGls, roles::RoleSet::kGs, roles::RoleSet::kGl, roles::RoleSet::kDense}) {
    for (const int32_t role_chunk : {1, 3}) {
      if (set == roles::RoleSet::kDense && role_chunk > 1) continue;
      Config c = config(set);
      c.roles.chunk = role_chunk;
      const auto model = make_model(c, kSeed);
      const Tensor tokens = random_tokens(1, 80, c);
      const TrainingOutput truth = argmax_forward(*model, tokens);
      std::vector<std::vector<int32_t>> live;
      for (const int64_t chunk : {int64_t{1}, int64_t{7}, int64_t{64}, int64_t{80}}) {
        auto cache = make_cache(*model, set == roles::RoleSet::kDense ? "full" : "learned");
        const Tensor logits = through_cache(*model, cache, tokens[0], chunk);
        EXPECT_LE(worst_difference(logits, truth.logits[0]), 1e-4)
            << roles::name(set) << ", role chunk " << role_chunk << ", chunk " << chunk;
        if (live.empty()) live = cache.live_per_head(0);
        EXPECT_EQ(live, cache.live_per_head(0)) << roles::name(set) << ", chunk " << chunk;
      }
      if (set != roles::RoleSet::kDense) {
        // The next token's query: keys it can read, itself excluded, against the share reported.
        EXPECT_LT(truth.sampled.pairs, 1.0);
        EXPECT_DOUBLE_EQ(truth.sampled.kv_end, truth.argmax_kv_end);
      }
    }
  }
}

TEST_P(EveryModel, GivesTheSameLogitsInABatchOfDifferentLengths) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  const Tensor tokens = random_tokens(3, 40, c);
  TrainingInput input;
  input.tokens = tokens;
  input.sample = false;
  std::vector<int32_t> lengths = {40, 1, 23};
  input.lengths = at::from_blob(lengths.data(), {3}, at::kInt);
  const c10::NoGradGuard no_grad;
  const Tensor logits = model->forward(input).logits;
  for (int64_t b = 0; b < 3; ++b) {
    const Tensor alone =
        argmax_forward(*model, tokens.narrow(0, b, 1).narrow(1, 0, lengths[b])).logits[0];
    EXPECT_LE(worst_difference(logits[b].narrow(0, 0, lengths[b]), alone), 1e-5)
        << "sequence " << b;
  }
}

TEST_P(EveryModel, DecodesSequencesOfABatchLikeEachAlone) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  const Tensor tokens = random_tokens(2, 30, c);
  auto together = make_cache(*model, "learned");
  const int32_t a = together.add_sequence(), b = together.add_sequence();
  StepInput first;
  first.step = {.slots = {a, b}, .row_start = {0, 20, 31}};
  first.tokens = at::cat({tokens[0].narrow(0, 0, 20), tokens[1].narrow(0, 0, 11)});
  first.last_row_only = true;
  const Tensor prompt = model->step(first, together);
  StepInput second;
  second.step = {.slots = {b, a}, .row_start = {0, 1, 2}};
  second.tokens = at::cat({tokens[1].narrow(0, 11, 1), tokens[0].narrow(0, 20, 1)});
  const Tensor next = model->step(second, together);
  const Tensor truth_a = argmax_forward(*model, tokens.narrow(0, 0, 1)).logits[0];
  const Tensor truth_b = argmax_forward(*model, tokens.narrow(0, 1, 1)).logits[0];
  EXPECT_LE(worst_difference(prompt[0], truth_a[19]), 1e-4);
  EXPECT_LE(worst_difference(prompt[1], truth_b[10]), 1e-4);
  EXPECT_LE(worst_difference(next[0], truth_b[11]), 1e-4);
  EXPECT_LE(worst_difference(next[1], truth_a[20]), 1e-4);
}

TEST_P(EveryModel, ObeysTheBudgetBiasInBothPasses) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  const Tensor tokens = random_tokens(1, 64, c);
  auto few = make_cache(*model, "learned", 0.05f);
  const Tensor logits = through_cache(*model, few, tokens[0], 16);
  const TrainingOutput biased = argmax_forward(*model, tokens, 0.05f);
  EXPECT_LE(worst_difference(logits, biased.logits[0]), 1e-4);
  EXPECT_LT(biased.sampled.kv_end, argmax_forward(*model, tokens).sampled.kv_end);
  EXPECT_LT(biased.sampled.kv_end, biased.argmax_kv_end);
}

TEST_P(EveryModel, GivesEveryParameterAGradient) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  TrainingInput input;
  input.tokens = random_tokens(2, 48, c);
  input.seed = 3;
  const TrainingOutput out = model->forward(input);
  (out.logits.square().mean() + out.price).backward();
  for (const auto& [name, parameter] : model->parameters()) {
    ASSERT_TRUE(parameter.grad().defined()) << name;
    EXPECT_GT(parameter.grad().abs().max().item<double>(), 0.0) << name;
    EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>()) << name;
  }
}

TEST_P(EveryModel, ReachesTheRoleLogitsFromTheTaskLossAlone) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  TrainingInput input;
  input.tokens = random_tokens(2, 48, c);
  model->forward(input).logits.square().mean().backward();
  int found = 0;
  for (const auto& [name, parameter] : model->parameters()) {
    if (name.find("roles") == std::string::npos) continue;
    ++found;
    EXPECT_GT(parameter.grad().abs().max().item<double>(), 0.0) << name;
  }
  EXPECT_EQ(found, c.layers);
}

TEST_P(EveryModel, DetachedScoresLeaveTheRestOfTheModelAlone) {
  const Config c = config();
  const auto gradient_of_price = [&](bool detach) {
    const auto model = make_model(c, kSeed);
    TrainingInput input;
    input.tokens = random_tokens(2, 48, c);
    input.detach_scores = detach;
    model->forward(input).price.backward();
    const Tensor& embedding = model->parameters().front().second;
    return embedding.grad().defined() ? embedding.grad().abs().max().item<double>() : 0.0;
  };
  EXPECT_GT(gradient_of_price(false), 0.0);
  EXPECT_EQ(gradient_of_price(true), 0.0);
}

TEST_P(EveryModel, WeightsThePriceOfEachSequenceAsItsGradient) {
  const auto model = make_model(small_config(GetParam(), roles::RoleSet::kGls), kSeed);
  const Tensor tokens = random_tokens(3, 40, model->config());
  const auto priced = [&](const Tensor& weights) {
    for (const auto& [name, tensor] : model->parameters()) tensor.mutable_grad() = Tensor();
    TrainingInput input;
    input.tokens = tokens;
    input.detach_scores = true;
    input.price_weights = weights;
    const Tensor price = model->forward(input).price;
    price.backward();
    Tensor gradient;
    for (const auto& [name, tensor] : model->parameters())
      if (is_score_layer(name)) gradient = tensor.grad().clone();
    return std::pair(price.item<double>(), gradient);
  };
  const auto weights = [](std::vector<float> values) {
    return at::from_blob(values.data(), {3}, at::kFloat).clone();
  };
  const auto [plain, plain_gradient] = priced({});
  const auto [ones, ones_gradient] = priced(weights({1, 1, 1}));
  EXPECT_NEAR(plain, ones, 1e-6);
  EXPECT_LT(worst_difference(plain_gradient, ones_gradient),
            1e-5 * plain_gradient.abs().max().item<double>());
  const auto [first, first_gradient] = priced(weights({4, 0, 0}));
  const auto [others, others_gradient] = priced(weights({0, 2, 8}));
  const auto [mixed, mixed_gradient] = priced(weights({4, 2, 8}));
  EXPECT_NEAR(first + others, mixed, 1e-5);
  EXPECT_LT(worst_difference(first_gradient + others_gradient, mixed_gradient),
            1e-5 * mixed_gradient.abs().max().item<double>());
}

TEST_P(EveryModel, WithEveryKeyAliveIsTheModelWithoutRoles) {
  const auto model = make_model(small_config(GetParam(), roles::RoleSet::kGls), kSeed);
  const Tensor tokens = random_tokens(2, 40, model->config());
  TrainingInput input;
  input.tokens = tokens;
  input.dense = true;
  const TrainingOutput dense = model->forward(input);
  EXPECT_FALSE(dense.price.defined());
  EXPECT_EQ(dense.sampled.pairs, 1);
  EXPECT_GT(worst_difference(dense.logits, argmax_forward(*model, tokens).logits), 1e-6);
  // A bias beyond all logits makes every key Global or Local; dense does not depend on roles.
  const auto plain = make_model(small_config(GetParam(), roles::RoleSet::kDense), kSeed);
  EXPECT_LT(worst_difference(dense.logits, argmax_forward(*plain, tokens).logits), 1e-5);
  EXPECT_LT(worst_difference(dense.logits, model->output(dense.hidden)), 1e-6);
  input.want_logits = false;
  EXPECT_FALSE(model->forward(input).logits.defined());
}

TEST_P(EveryModel, RecomputedActivationsGiveTheSameGradients) {
  const auto model = make_model(small_config(GetParam(), roles::RoleSet::kGls), kSeed);
  const auto gradients = [&](bool recompute) {
    for (const auto& [name, tensor] : model->parameters()) tensor.mutable_grad() = Tensor();
    TrainingInput input;
    input.tokens = random_tokens(2, 40, model->config());
    input.recompute = recompute;
    const TrainingOutput out = model->forward(input);
    (out.logits.square().mean() + out.price).backward();
    std::vector<Tensor> all;
    for (const auto& [name, tensor] : model->parameters()) all.push_back(tensor.grad().clone());
    return all;
  };
  const auto kept = gradients(false), again = gradients(true);
  for (size_t i = 0; i < kept.size(); ++i) {
    EXPECT_LE(worst_difference(kept[i], again[i]), 1e-5 * kept[i].abs().max().item<double>())
        << model->parameters()[i].first;
  }
}

TEST_P(EveryModel, DrawsTheSameRolesInAnyBatch) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  TrainingInput both;
  both.tokens = random_tokens(2, 40, c);
  std::vector<int64_t> ids = {901, 17};
  both.sequences = at::from_blob(ids.data(), {2}, at::kLong);
  both.seed = 5;
  both.step = 11;
  const c10::NoGradGuard no_grad;
  const TrainingOutput together = model->forward(both);
  double pairs = 0;
  for (int64_t b = 0; b < 2; ++b) {
    TrainingInput one = both;
    one.tokens = both.tokens.narrow(0, b, 1);
    one.sequences = both.sequences.narrow(0, b, 1);
    const TrainingOutput alone = model->forward(one);
    EXPECT_LE(worst_difference(alone.logits[0], together.logits[b]), 1e-5);
    pairs += alone.sampled.pairs / 2;
  }
  EXPECT_NEAR(pairs, together.sampled.pairs, 1e-6);
  both.step = 12;
  EXPECT_NE(model->forward(both).sampled.pairs, together.sampled.pairs);
}

TEST_P(EveryModel, IsTheDenseModelWhileTheWindowIsLongerThanTheText) {
  Config c = config(roles::RoleSet::kGs);
  c.roles.window = 1000;
  const auto windowed = make_model(c, kSeed),
             dense = make_model(config(roles::RoleSet::kDense), kSeed);
  const Tensor tokens = random_tokens(2, 50, c);
  const TrainingOutput out = argmax_forward(*windowed, tokens);
  EXPECT_LE(worst_difference(out.logits, argmax_forward(*dense, tokens).logits), 1e-5);
  EXPECT_EQ(out.sampled.pairs, 1.0);
  EXPECT_EQ(out.argmax_kv_end, 1.0);
}

TEST_P(EveryModel, IsTheDenseModelWhileEveryKeyIsGlobal) {
  const Config c = config(roles::RoleSet::kGs);
  const auto model = make_model(c, kSeed),
             dense = make_model(config(roles::RoleSet::kDense), kSeed);
  const Tensor tokens = random_tokens(2, 50, c);
  const TrainingOutput out = argmax_forward(*model, tokens, /*bias=*/-1e9f);
  EXPECT_LE(worst_difference(out.logits, argmax_forward(*dense, tokens).logits), 1e-5);
  EXPECT_EQ(out.sampled.pairs, 1.0);
  EXPECT_FLOAT_EQ(out.price.item<float>(), 1.0f);
}

TEST_P(EveryModel, ComesBackFromItsFolder) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  const auto folder = std::filesystem::path(::testing::TempDir()) / ("model_" + GetParam());
  save_model(*model, folder);
  // Hugging Face's layout has no place for score layers: those of pretrained families are made
  // anew, from the same seed the same. Our own models' come with them.
  PretrainedOptions options;
  if (is_pretrained(folder)) options = {.roles = c.roles, .seed = kSeed};
  const auto again = load_model(folder, options);
  ASSERT_EQ(again->parameters().size(), model->parameters().size());
  for (size_t i = 0; i < model->parameters().size(); ++i) {
    EXPECT_EQ(again->parameters()[i].first, model->parameters()[i].first);
    EXPECT_TRUE(at::equal(again->parameters()[i].second, model->parameters()[i].second))
        << model->parameters()[i].first;
  }
  const Tensor tokens = random_tokens(1, 20, c);
  EXPECT_TRUE(
      at::equal(argmax_forward(*again, tokens).logits, argmax_forward(*model, tokens).logits));
  std::filesystem::remove_all(folder);
}

TEST_P(EveryModel, ADenseOneIsOpenedWithScoreLayersThatAloneCanLearn) {
  const auto dense = make_model(small_config(GetParam(), roles::RoleSet::kDense), kSeed);
  const auto folder = std::filesystem::path(::testing::TempDir()) / ("dense_" + GetParam());
  save_model(*dense, folder);
  const auto model =
      load_model(folder, {.roles = {.set = roles::RoleSet::kGs, .window = 3}, .seed = 7});
  EXPECT_EQ(model->config().roles.set, roles::RoleSet::kGs);
  int layers = 0;
  for (const auto& [name, tensor] : model->parameters()) {
    EXPECT_EQ(tensor.requires_grad(), is_score_layer(name)) << name;
    layers += is_score_layer(name);
  }
  EXPECT_EQ(layers, model->config().layers);
  TrainingInput input;
  input.tokens = random_tokens(1, 20, model->config());
  input.dense = true;
  EXPECT_TRUE(at::equal(model->forward(input).logits, argmax_forward(*dense, input.tokens).logits));
  std::filesystem::remove_all(folder);
}

TEST_P(EveryModel, RefusesWhatItWasNotBuiltFor) {
  const Config c = config();
  const auto model = make_model(c, kSeed);
  const auto message = [&](const Tensor& tokens) -> std::string {
    try {
      argmax_forward(*model, tokens);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_NE(message(random_tokens(1, 97, c)).find("context of 96"), std::string::npos);
  EXPECT_NE(message(at::full({1, 4}, 61, at::kLong)).find("vocabulary of 61"), std::string::npos);
  EXPECT_NE(message(at::empty({1, 0}, at::kLong)).find("no tokens"), std::string::npos);
  auto cache = make_cache(*model, "full");
  EXPECT_THROW(through_cache(*model, cache, random_tokens(1, 97, c)[0], 50), Error);
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Architecture& a : architectures()) all.emplace_back(a.name);
  return all;
}
INSTANTIATE_TEST_SUITE_P(Models, EveryModel, ::testing::ValuesIn(names()),
                         [](const auto& p) { return p.param; });

}  // namespace
}  // namespace natslm::models
