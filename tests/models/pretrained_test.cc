// Pretrained families against recorded truths of `transformers` (tools/golden_models.py): tiny
// random models of every family and of every way in which a config can change what is computed.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/pretrained.h"

#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "natslm/models/models.h"
#include "natslm/models/safetensors.h"
#include "tests/models/golden_models.h"
#include "tests/models/through_cache.h"
#include "tests/support/error_of.h"
#include "tests/support/gguf_builder.h"
#include "tests/support/one_thread.h"
#include "tests/support/scratch_folder.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using test::error_of;

constexpr double kTolerance = 2e-4;

Tensor truth(const Json& a_case) {
  return SafetensorsFile(kGolden / "logits.safetensors")
      .tensor(a_case.value("logits", a_case["name"].get<std::string>()))
      .clone();
}

double worst_difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a - b).abs().max().item<double>();
}

class EveryCase : public ::testing::TestWithParam<std::string> {
 protected:
  const Json& a_case() const { return case_named(GetParam()); }
  std::unique_ptr<Model> open(at::ScalarType type = at::kFloat) const {
    return open_pretrained(write_folder(a_case()),
                           {.type = type, .context = a_case()["context"].get<int32_t>()});
  }
};

TEST_P(EveryCase, GivesTheReferencesLogitsAtEveryPosition) {
  EXPECT_LE(worst_difference(logits_of(*open(), golden_tokens()), truth(a_case())), kTolerance);
}

TEST_P(EveryCase, GivesThemThroughTheCacheAtOnceInChunksAndTokenByToken) {
  const auto model = open();
  for (const int64_t chunk : {40, 7, 1}) {
    auto cache = make_cache(*model, "full");
    EXPECT_LE(
        worst_difference(through_cache(*model, cache, golden_tokens(), chunk), truth(a_case())),
        kTolerance)
        << "chunk " << chunk;
    // What the model's own windows hide from all queries to come is gone.
    const auto live = cache.live_per_head(0);
    for (int32_t layer = 0; layer < model->config().layers; ++layer) {
      const int32_t window = model->config().window(layer);
      const int32_t kept = window > 0 ? std::min(window - 1, 40) : 40;
      for (const int32_t count : live[layer]) EXPECT_EQ(count, kept) << "layer " << layer;
    }
  }
}

TEST_P(EveryCase, NeedsNoMoreThanBf16ForWeightsThatAreBf16Numbers) {
  const auto model = open(at::kBFloat16);
  EXPECT_LE(worst_difference(logits_of(*model, golden_tokens()), truth(a_case())), kTolerance);
  auto cache = make_cache(*model, "full");
  EXPECT_LE(worst_difference(through_cache(*model, cache, golden_tokens(), 3), truth(a_case())),
            kTolerance);
}

// On the CPU the fused pass runs on the reference kernels, in float32: what is tested is what the
// decoder makes of them.
TEST_P(EveryCase, FusedNormsAndActivationsGiveTheSameHiddenStatesAndGradients) {
  const auto model =
      open_pretrained(write_folder(a_case()), {.context = a_case()["context"].get<int32_t>(),
                                               .roles = {.set = roles::RoleSet::kGls, .window = 3},
                                               .seed = 5});
  struct Pass {
    Tensor hidden, price;
    std::vector<Tensor> gradients;
  };
  const auto pass = [&](bool fused, bool recompute) {
    for (const auto& [name, tensor] : model->parameters()) tensor.mutable_grad() = Tensor();
    TrainingInput input;
    input.tokens = golden_tokens().unsqueeze(0);
    input.fused = fused;
    input.recompute = recompute;
    input.want_logits = false;
    const TrainingOutput out = model->forward(input);
    (out.hidden.pow(3).mean() + out.price).backward();
    Pass result = {.hidden = out.hidden.detach(), .price = out.price.detach(), .gradients = {}};
    for (const auto& [name, tensor] : model->parameters())
      if (tensor.requires_grad()) result.gradients.push_back(tensor.grad().clone());
    return result;
  };
  const Pass plain = pass(false, false);
  for (const bool recompute : {false, true}) {
    const Pass fused = pass(true, recompute);
    EXPECT_LE(worst_difference(fused.hidden, plain.hidden), 1e-4);
    EXPECT_LE(worst_difference(fused.price, plain.price), 1e-6);
    ASSERT_EQ(fused.gradients.size(), plain.gradients.size());
    for (size_t i = 0; i < plain.gradients.size(); ++i) {
      EXPECT_LE(worst_difference(fused.gradients[i], plain.gradients[i]),
                1e-3 * plain.gradients[i].abs().max().item<double>());
    }
  }
}

TEST(Rope, HasTheFrequenciesOfPublishedModelsToTheLastDigits) {
  std::ifstream file(kGolden / "frequencies.json");
  const Json all = Json::parse(file);
  for (const Json& each : all) {
    const Config config = config_from_hf(each["config"], each["name"].get<std::string>());
    const RopeFrequencies ours =
        rope_frequencies(config.blocks.rope[0], config.head_dim, each["text"].get<int32_t>());
    EXPECT_FLOAT_EQ(ours.attention_factor, each["attention_factor"].get<float>()) << each["name"];
    ASSERT_EQ(ours.inverse.size(), each["inverse"].size()) << each["name"];
    for (size_t c = 0; c < ours.inverse.size(); ++c) {
      // Both round to float32 after each operation; the power function differs in its last bit.
      EXPECT_NEAR(ours.inverse[c] / each["inverse"][c].get<float>(), 1.0, 2.5e-7)
          << each["name"] << ", channel " << c;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Pretrained, EveryCase, ::testing::ValuesIn(case_names()),
                         [](const auto& p) { return p.param; });

TEST(Pretrained, HasACaseForEveryFamily) {
  for (const Architecture& a : architectures()) {
    if (a.checked.empty()) continue;
    EXPECT_TRUE(std::ranges::any_of(cases(), [&](const Json& c) {
      return c["config"]["model_type"] == std::string(a.name);
    })) << a.name;
  }
}

TEST(Pretrained, RunsWithEveryPolicyThatNeedsNoRolesAndSaysWhyLearnedCannot) {
  for (const char* name : {"llama", "gemma3", "qwen2_windows", "mistral", "gpt2"}) {
    const auto model = open_pretrained(write_folder(case_named(name)));
    for (const char* spec :
         {"streaming:sinks=2,window=10", "h2o:heavy=0.2,recent=0.2", "random:keep=0.25"}) {
      auto cache = make_cache(*model, spec);
      const Tensor logits = through_cache(*model, cache, golden_tokens(), 8);
      EXPECT_TRUE(logits.isfinite().all().item<bool>()) << name << ", " << spec;
    }
    EXPECT_NE(error_of([&] { make_cache(*model, "learned"); }).find("roles"), std::string::npos);
  }
}

// A window of the model's own ends Locals too, whose end is not known when they come, and a
// training pass hides what a cache has dropped.
TEST(Pretrained, WindowsHoldForLearnedRolesInBothPasses) {
  for (const char* name : {"mistral", "gemma3", "qwen3_windows"}) {
    for (const auto set : {roles::RoleSet::kGls, roles::RoleSet::kGl, roles::RoleSet::kGs}) {
      const auto model = open_pretrained(write_folder(case_named(name)),
                                         {.roles = {.set = set, .window = 3}, .seed = 5});
      const Tensor whole = logits_of(*model, golden_tokens());
      for (const int64_t chunk : {40, 9, 1}) {
        auto cache = make_cache(*model, "learned");
        EXPECT_LE(worst_difference(through_cache(*model, cache, golden_tokens(), chunk), whole),
                  kTolerance)
            << name << ", " << roles::name(set) << ", chunk " << chunk;
        const auto live = cache.live_per_head(0);
        for (int32_t layer = 0; layer < model->config().layers; ++layer) {
          const int32_t window = model->config().window(layer);
          if (window == 0) continue;
          for (const int32_t count : live[layer]) EXPECT_LT(count, window);
        }
      }
    }
  }
}

TEST(Pretrained, FreezesEverythingButTheScoreLayers) {
  const auto model =
      open_pretrained(write_folder(case_named("llama")), {.roles = {.set = roles::RoleSet::kGls}});
  TrainingInput input;
  input.tokens = golden_tokens().unsqueeze(0);
  input.detach_scores = true;
  const TrainingOutput out = model->forward(input);
  (out.logits.square().mean() + out.price).backward();
  int scores = 0;
  for (const auto& [name, parameter] : model->parameters()) {
    EXPECT_EQ(parameter.requires_grad(), is_score_layer(name)) << name;
    EXPECT_EQ(parameter.grad().defined(), is_score_layer(name)) << name;
    scores += is_score_layer(name);
  }
  EXPECT_EQ(scores, model->config().layers);
}

TEST(Pretrained, RefusesWhatItDoesNotUnderstandByName) {
  const Json& base = case_named("llama");
  const auto refusal = [&](const std::function<void(Json&)>& change) {
    Json config = base["config"];
    change(config);
    const fs::path folder =
        write_folder("changed", config, kGolden / base["weights"].get<std::string>());
    return error_of([&] { open_pretrained(folder); });
  };
  const auto expect = [&](const std::string& what, const std::function<void(Json&)>& change) {
    const std::string message = refusal(change);
    EXPECT_NE(message.find(what), std::string::npos) << what << ": " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  };
  expect("", [](Json& c) { c["use_cache"] = false; });
  expect("a_new_idea", [](Json& c) { c["a_new_idea"] = 3; });
  expect("quantization_config", [](Json& c) { c["quantization_config"] = {{"bits", 4}}; });
  expect("model_type", [](Json& c) {
    c.erase("model_type");
    c["architecture"] = 3;
  });
  expect("mixtral", [](Json& c) { c["model_type"] = "mixtral"; });
  expect("hidden_size", [](Json& c) { c["hidden_size"] = -1; });
  expect("hidden_size", [](Json& c) { c["hidden_size"] = "wide"; });
  expect("num_hidden_layers", [](Json& c) { c.erase("num_hidden_layers"); });
  expect("activation", [](Json& c) { c["hidden_act"] = "snake"; });
  expect("rope_parameters.new_field", [](Json& c) { c["rope_parameters"]["new_field"] = 1; });
  expect("vision", [](Json& c) { c["rope_parameters"]["rope_type"] = "vision"; });
  expect("embed_tokens", [](Json& c) { c["vocab_size"] = 39; });
  // One more layer than the file has, one fewer, another width.
  expect("layers.2", [](Json& c) { c["num_hidden_layers"] = 3; });
  expect("layers.1", [](Json& c) { c["num_hidden_layers"] = 1; });
  expect("expected", [](Json& c) { c["intermediate_size"] = 40; });
  expect("kv_heads", [](Json& c) { c["num_key_value_heads"] = 3; });
  for (const double part : {-1.0, 0.0, 1e-9, 1.5, 1e300}) {
    expect("'partial_rotary_factor'", [&](Json& c) { c["partial_rotary_factor"] = part; });
    expect("'rope_parameters.partial_rotary_factor'",
           [&](Json& c) { c["rope_parameters"]["partial_rotary_factor"] = part; });
  }
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  const fs::path folder = write_folder(base);
  std::ofstream(folder / "config.json") << "{\"model_type\": \"llama\", \"x\": " << deep << "}";
  EXPECT_NE(error_of([&] { open_pretrained(folder); }).find("nests more than"), std::string::npos);
}

// Readers make tables of every layer and derive sizes from others before anybody checks the whole.
TEST(Pretrained, RefusesSizesThatNoModelHasBeforeTheyCostMemory) {
  constexpr int32_t kHuge = 1 << 30;
  const auto refusal = [](Json config, const char* field, int32_t value) {
    if (config["model_type"] == "gemma3_text") config.erase("layer_types");
    config[field] = value;
    return error_of([&] { config_from_hf(config, "x"); });
  };
  for (const Json& c : cases()) {
    const Json& config = c["config"];
    const bool gpt2 = config["model_type"] == "gpt2";
    const char* layers = gpt2 ? "n_layer" : "num_hidden_layers";
    const char* width = gpt2 ? "n_embd" : "hidden_size";
    EXPECT_EQ(refusal(config, layers, kHuge), std::string("x: the field '") + layers +
                                                  "' is '1073741824'; it must be at most 4096");
    EXPECT_EQ(refusal(config, width, kHuge), std::string("x: the field '") + width +
                                                 "' is '1073741824'; it must be at most 1048576");
  }

  GgufBuilder gguf;
  const auto number = [&](const std::string& key, uint32_t value) {
    gguf.value("gemma3." + key, GgufFile::ValueType::kU32, raw(value));
  };
  gguf.value("general.architecture", GgufFile::ValueType::kString, raw("gemma3"));
  number("block_count", kHuge);
  for (const char* key : {"embedding_length", "feed_forward_length", "attention.head_count",
                          "context_length", "attention.sliding_window"})
    number(key, 8);
  gguf.value("gemma3.attention.layer_norm_rms_epsilon", GgufFile::ValueType::kF32, raw(1e-6f));
  gguf.tensor({"token_embd.weight", {8, 8}, 0, 0});
  gguf.data.resize(8 * 8 * sizeof(float));
  const test::ScratchFolder folder;
  const fs::path file = folder / "huge.gguf";
  std::ofstream(file, std::ios::binary) << gguf.bytes();
  EXPECT_EQ(error_of([&] { pretrained_config(file); }),
            file.string() + ": the key gemma3.block_count is 1073741824; it must be at most 4096");
}

}  // namespace
}  // namespace natslm::models
