// A model of a few hundred weights with everything the trainer meets: matrices and vectors, a price
// that depends on them, and noise keyed by (seed, step, sequence). Its arithmetic is plain
// LibTorch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>

#include <string>
#include <utility>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/dataset.h"
#include "natslm/models/model.h"

namespace natslm::train {

class TinyModel : public models::Model {
 public:
  static constexpr int32_t kVocabulary = 13, kWidth = 8;

  explicit TinyModel(bool dense = false) {
    config_.architecture = "tiny";
    config_.vocabulary = kVocabulary;
    config_.width = kWidth;
    config_.context = 64;
    config_.roles.set = dense ? roles::RoleSet::kDense : roles::RoleSet::kGls;
    add("embedding.weight", {kVocabulary, kWidth}, 1);
    add("hidden.weight", {kWidth, kWidth}, 2);
    add("hidden.bias", {kWidth}, 3);
    add("roles.weight", {1, kWidth}, 4);
  }

  models::TrainingOutput forward(const models::TrainingInput& input) override {
    const auto& p = parameters_;
    const at::Tensor x = at::embedding(p[0].second, input.tokens);
    const at::Tensor h = at::tanh(at::matmul(x, p[1].second.t()) + p[2].second);
    at::Tensor score = at::matmul(h, p[3].second.t());
    if (input.sample) {
      // Stands for sampled roles: a different, reproducible perturbation for each (step, sequence).
      const at::Tensor noise =
          at::sin(input.sequences.to(at::kFloat) + static_cast<double>(input.step)) * 0.1;
      score = score + noise.view({-1, 1, 1});
    }
    const at::Tensor alive = at::sigmoid(score);
    models::TrainingOutput output;
    output.logits = at::matmul(h * alive, p[0].second.t());
    if (output_is_saved) output.logits = at::tanh(output.logits);
    if (config_.roles.set != roles::RoleSet::kDense) {
      output.price = alive.mean();
      const double share = output.price.item<double>();
      output.sampled = {share, share, share};
      output.argmax_kv_end = share;
    }
    if (input.step == poison_step) output.logits = output.logits * poison;
    return output;
  }

  at::Tensor step(const models::StepInput&, cache::KvCache&) override {
    fail("the tiny model only trains");
  }

  bool output_is_saved = false;  // the last operation keeps the logits for its backward pass
  int64_t poison_step = -1;      // at this step (0-based) ...
  float poison = 1;              // ... the logits are multiplied by this

 private:
  void add(const std::string& name, at::IntArrayRef shape, uint64_t seed) {
    at::Tensor values = at::zeros(shape);
    float* data = values.mutable_data_ptr<float>();
    for (int64_t i = 0; i < values.numel(); ++i) {
      const auto bits = static_cast<uint32_t>(mix64(seed * 1000003 + static_cast<uint64_t>(i)));
      data[i] = open_unit(bits) - 0.5f;
    }
    parameters_.emplace_back(name, values.set_requires_grad(true));
  }
};

// Text with structure to learn: each token depends on the one before, with some noise.
inline std::vector<int32_t> tiny_text(int64_t tokens) {
  std::vector<int32_t> text(static_cast<size_t>(tokens));
  for (size_t i = 1; i < text.size(); ++i) {
    const bool noisy = mix64(i) % 4 == 0;
    text[i] = noisy ? static_cast<int32_t>(mix64(i * 7) % TinyModel::kVocabulary)
                    : (text[i - 1] * 5 + 3) % TinyModel::kVocabulary;
  }
  return text;
}

}  // namespace natslm::train
