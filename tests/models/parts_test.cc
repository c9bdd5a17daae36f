// The parts that models share: rotary heads, first weights, configs and folders.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/models/init.h"
#include "natslm/models/models.h"
#include "natslm/models/rotary.h"
#include "natslm/models/safetensors.h"
#include "tests/support/error_of.h"

namespace natslm::models {
namespace {

using at::Tensor;
using test::error_of;
namespace fs = std::filesystem;

double worst(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

Config small_config() {
  Config c;
  c.layers = 1;
  c.width = 16;
  c.q_heads = 2;
  c.kv_heads = 1;
  c.head_dim = 8;
  c.hidden = 24;
  c.vocabulary = 11;
  c.context = 32;
  return c;
}

TEST(Rotary, TurnsPairsOfChannelsByTheirPositionsAngle) {
  const Rotary rotary(8, 10000, 40);
  const Tensor x = normal({5, 3, 8}, 1, 1, "x");
  const Tensor positions = at::arange(7, 39, 7, at::kInt);
  const Tensor y = rotary.rotate(x, positions);
  for (int64_t n = 0; n < 5; ++n) {
    for (int64_t h = 0; h < 3; ++h) {
      for (int64_t c = 0; c < 4; ++c) {
        const double angle = (7.0 + 7 * n) * std::pow(10000.0, -2.0 * c / 8);
        const double a = x[n][h][c].item<double>(), b = x[n][h][c + 4].item<double>();
        EXPECT_NEAR(y[n][h][c].item<double>(), a * std::cos(angle) - b * std::sin(angle), 1e-5);
        EXPECT_NEAR(y[n][h][c + 4].item<double>(), b * std::cos(angle) + a * std::sin(angle), 1e-5);
      }
    }
  }
}

TEST(Rotary, SplitsAProjectionIntoTurnedHeadsAndPutsTheGradientTogetherAgain) {
  const int64_t b = 2, t = 70, d = 8, hq = 4, hkv = 2, rest = 5;
  const Rotary rotary(d, 10000, 80);
  const auto run = [&](at::ScalarType type) {
    const Tensor fused =
        normal({b, t, (hq + 2 * hkv) * d + rest}, 1, 3, "fused").to(type).requires_grad_(true);
    const Heads heads = rotary.split_heads(fused, hq, hkv);
    const auto weighted = [&](const Tensor& x, const char* name) {
      return (x * normal(x.sizes(), 1, 4, name).to(type)).sum();
    };
    (weighted(heads.q, "q") + weighted(heads.k, "k") + weighted(heads.v, "v") +
     weighted(heads.rest, "rest"))
        .backward();
    return std::vector<Tensor>{heads.q, heads.k, heads.v, heads.rest, fused.grad()};
  };
  // Double takes the plain tensor operations, float the single pass.
  const auto truth = run(at::kDouble), fast = run(at::kFloat);
  for (size_t i = 0; i < truth.size(); ++i) EXPECT_LE(worst(fast[i], truth[i]), 1e-5) << i;
  EXPECT_TRUE(fast[0].is_contiguous() && fast[1].is_contiguous() && fast[2].is_contiguous());
  // Token t of head h is what rotate() makes of it.
  const Tensor fused = normal({b, t, (hq + 2 * hkv) * d + rest}, 1, 3, "fused");
  const Tensor row = fused[1].narrow(1, 0, hq * d).reshape({t, hq, d});
  EXPECT_LE(worst(rotary.rotate(row, at::arange(t, at::kInt)), fast[0][1].transpose(0, 1)), 1e-6);
}

TEST(Rotary, RefusesPositionsBeyondTheContext) {
  const Rotary rotary(8, 10000, 10);
  const Tensor x = normal({1, 1, 8}, 1, 1, "x");
  EXPECT_NE(error_of([&] { rotary.rotate(x, at::arange(10, 11, at::kInt)); }).find("context of 10"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              rotary.split_heads(normal({1, 11, 24}, 1, 1, "x"), 1, 1);
            }).find("context of 10"),
            std::string::npos);
}

TEST(FirstWeights, AreNormalAndDependOnSeedAndNameAlone) {
  const int threads = at::get_num_threads();
  const Tensor x = normal({300, 1000}, 0.02, 7, "a");
  EXPECT_NEAR(x.mean().item<double>(), 0, 2e-4);
  EXPECT_NEAR(x.std().item<double>(), 0.02, 2e-4);
  EXPECT_NEAR(x.div(0.02).pow(4).mean().item<double>(), 3, 0.1);
  at::set_num_threads(1);
  EXPECT_TRUE(at::equal(x, normal({300, 1000}, 0.02, 7, "a")));
  at::set_num_threads(threads);
  EXPECT_FALSE(at::equal(x, normal({300, 1000}, 0.02, 8, "a")));
  EXPECT_FALSE(at::equal(x, normal({300, 1000}, 0.02, 7, "b")));
  // A larger tensor begins with the same numbers; recorded ones are the same on every machine.
  EXPECT_TRUE(at::equal(x[0], normal({1000}, 0.02, 7, "a")));
  EXPECT_EQ(std::bit_cast<uint32_t>(normal({3}, 1, 42, "golden")[2].item<float>()), 3218633581u);
}

TEST(Presets, AreTheOnesDocumented) {
  const Config& tiny = preset("tiny").config;
  EXPECT_EQ(tiny.layers, 4);
  EXPECT_EQ(tiny.width, 128);
  EXPECT_EQ(tiny.q_heads, 2);
  EXPECT_EQ(tiny.head_dim, 64);
  EXPECT_EQ(tiny.context, 512);
  EXPECT_EQ(tiny.vocabulary, 2048);
  EXPECT_EQ(tiny.roles.window, 16);
  EXPECT_EQ(preset("tiny").batch, 16);
  EXPECT_EQ(preset("small").config.width, 384);
  EXPECT_EQ(preset("gpt2-small").config.roles.window, 32);
  for (const Preset& p : presets()) check(p.config);
  EXPECT_NE(error_of([] { preset("huge"); }).find("choose one of tiny, small, gpt2-small"),
            std::string::npos);
}

TEST(Config, ComesBackFromJson) {
  Config c = small_config();
  c.roles = {.set = roles::RoleSet::kGs, .window = 9, .chunk = 4};
  c.rope_base = 1e5;
  const auto json = to_json(c);
  EXPECT_EQ(to_json(config_from_json(json, "x")), json);
}

TEST(Config, ErrorsNameFileFieldAndValue) {
  const auto with = [](const char* field, const nlohmann::ordered_json& value) {
    auto json = to_json(small_config());
    if (value.is_null()) {
      json.erase(field);
    } else {
      json[field] = value;
    }
    return error_of([&] { config_from_json(json, "folder/config.json"); });
  };
  EXPECT_EQ(with("width", nullptr), "folder/config.json: the field 'width' is missing");
  EXPECT_NE(with("width", "wide").find("the field 'width' is '\"wide\"'"), std::string::npos);
  EXPECT_NE(with("width", 1.5).find("whole number"), std::string::npos);
  EXPECT_NE(with("width", -4).find("whole number"), std::string::npos);
  EXPECT_NE(with("kv_heads", 4).find("q_heads 2 is no multiple of kv_heads 4"), std::string::npos)
      << with("kv_heads", 4);
  EXPECT_NE(with("kv_heads", 0).find("kv_heads 0"), std::string::npos);
  EXPECT_NE(with("head_dim", 12).find("no multiple of 8"), std::string::npos);
  EXPECT_NE(with("architecture", "rnn").find("this build has gpt"), std::string::npos);
  EXPECT_NE(with("roles", {{"set", "xyz"}}).find("dense, gls, gs, gl"), std::string::npos);
  EXPECT_NE(with("roles", 3).find("'roles' must be an object"), std::string::npos);
  // Whatever a file says, messages are short and of one line.
  EXPECT_NE(with("architecture", "g\npt").find("'g\\x0apt' is unknown"), std::string::npos);
  EXPECT_NE(with("roles", {{"set", "g\nls"}}).find("'g\\x0als' are unknown"), std::string::npos);
  EXPECT_LT(with("width", std::string(1000, 'x')).size(), 300);
}

class ModelFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(::testing::TempDir()) / "natslm_model_folder";
    fs::remove_all(folder_);
    save_model(*make_model(small_config(), 1), folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string load_error() const {
    return error_of([&] { load_model(folder_); });
  }
  fs::path folder_;
};

TEST_F(ModelFolder, LoadsWhatWasSaved) {
  EXPECT_EQ(load_error(), "");
}

TEST_F(ModelFolder, NamesTheFileThatIsMissing) {
  fs::remove(folder_ / "model.safetensors");
  EXPECT_NE(load_error().find("model.safetensors"), std::string::npos) << load_error();
  fs::remove(folder_ / "config.json");
  EXPECT_NE(load_error().find("config.json"), std::string::npos) << load_error();
  fs::remove_all(folder_);
  EXPECT_NE(load_error().find("no folder"), std::string::npos) << load_error();
}

TEST_F(ModelFolder, NamesTheTensorThatDoesNotFit) {
  Config wider = small_config();
  wider.hidden = 32;
  save_config(wider, folder_);
  const std::string shape = load_error();
  EXPECT_NE(shape.find("layers.0.mlp.in.weight"), std::string::npos) << shape;
  EXPECT_NE(shape.find("32"), std::string::npos) << shape;
  EXPECT_NE(shape.find("24"), std::string::npos) << shape;
  Config dense = small_config();
  dense.roles.set = roles::RoleSet::kDense;
  save_config(dense, folder_);
  EXPECT_NE(load_error().find("layers.0.attention.roles.weight is no part of this model"),
            std::string::npos)
      << load_error();
}

TEST_F(ModelFolder, TakesScoreLayersOnlyIfItHasNone) {
  const PretrainedOptions options{.roles = {.set = roles::RoleSet::kGls, .window = 4}, .seed = 5};
  const auto refusal = [&] { return error_of([&] { load_model(folder_, options); }); };
  EXPECT_NE(refusal().find("trained with roles of its own"), std::string::npos) << refusal();
  Config dense = small_config();
  dense.roles.set = roles::RoleSet::kDense;
  save_config(dense, folder_);  // beside weights with score layers
  EXPECT_NE(refusal().find("layers.0.attention.roles.weight is no part of this model"),
            std::string::npos)
      << refusal();
  save_model(*make_model(dense, 1), folder_);
  Config wanted = dense;
  wanted.roles = options.roles;
  const auto fresh = make_model(wanted, options.seed), model = load_model(folder_, options);
  const auto saved = load_model(folder_);
  ASSERT_EQ(model->parameters().size(), saved->parameters().size() + 1);
  size_t next = 0;
  for (size_t i = 0; i < model->parameters().size(); ++i) {
    const auto& [name, tensor] = model->parameters()[i];
    const Tensor& expected =
        is_score_layer(name) ? fresh->parameters()[i].second : saved->parameters()[next++].second;
    EXPECT_TRUE(at::equal(tensor, expected)) << name;
  }
}

TEST_F(ModelFolder, RefusesADamagedConfig) {
  std::ofstream(folder_ / "config.json") << "{\"layers\": 1";
  EXPECT_NE(load_error().find("not valid JSON"), std::string::npos) << load_error();
  EXPECT_EQ(load_error().find('\n'), std::string::npos);
  std::ofstream(folder_ / "config.json")
      << "{\"architecture\": " << std::string(200'000, '[') << std::string(200'000, ']') << "}";
  EXPECT_NE(load_error().find("config.json: nests more than"), std::string::npos) << load_error();
}

}  // namespace
}  // namespace natslm::models
