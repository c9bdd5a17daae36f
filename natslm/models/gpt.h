// The house's own decoder: pre-norm blocks of attention and a GELU feed-forward, LayerNorm without
// bias, rotary positions, tied embedding, no biases anywhere, grouped-query attention if asked for.
//
// Weights: embedding.weight, layers.N.attention_norm.weight,
// layers.N.attention.{qkv,out,roles}.weight, layers.N.mlp_norm.weight,
// layers.N.mlp.{in,out}.weight, final_norm.weight; shapes in gpt.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "natslm/models/blocks.h"
#include "natslm/models/model.h"
#include "natslm/models/rotary.h"

namespace natslm::models {

// All weights, float32; the tensors of Model::parameters().
struct GptWeights {
  struct Layer {
    at::Tensor attention_norm, mlp_norm;  // [width]
    AttentionWeights attention;
    at::Tensor mlp_in, mlp_out;  // [hidden, width], [width, hidden]
  };
  at::Tensor embedding;   // [vocabulary, width]
  at::Tensor final_norm;  // [width]
  std::vector<Layer> layers;
};

class Gpt : public Model {
 public:
  // With first weights that depend on config and seed alone: N(0, initial_deviation), the outputs
  // of attention and feed-forward that / sqrt(2 layers), the score layers N(0, 0.02), norms 1.
  // Throws Error for a config that cannot be.
  Gpt(const Config& config, uint64_t seed);

  void to(c10::Device device) override;
  std::unique_ptr<TrainingPass> training_pass(at::ScalarType type) override;
  TrainingOutput forward(const TrainingInput& input) override;
  at::Tensor output(const at::Tensor& hidden) const override;
  at::Tensor step(const StepInput& input, cache::KvCache& cache) override;

 private:
  using Layer = GptWeights::Layer;

  at::Tensor parameter(const std::string& name, at::Tensor value);
  at::Tensor norm(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor feed_forward(const at::Tensor& x, const Layer& layer) const;

  Rotary rotary_;
  GptWeights weights_;
};

}  // namespace natslm::models
