// The decoder of all pretrained families: pre-norm blocks of attention and a feed-forward part,
// with what a family does differently as options (block_options.h). The families themselves
// (llama.cc, gemma3.cc, ...) only say which options and names their files mean.
//
// Weights: embedding.weight, positions.weight, layers.N.attention_norm.weight,
// layers.N.attention.{qkv,out}.weight, layers.N.attention.{q_norm,k_norm}.weight,
// layers.N.attention.roles.weight, layers.N.attention_post_norm.weight, layers.N.mlp_norm.weight,
// layers.N.mlp.{in,out}.weight, layers.N.mlp_post_norm.weight, final_norm.weight, output.weight,
// and a .bias beside those that have one; shapes in decoder.cc.
//
// Channels of query and key heads are in the order in which pairs (c, c + D/2) turn together, the
// ones that do not turn filling up each half; whoever loads weights sees to it.
//
// Matrices may be bf16 (then on the CPU activations stay float32; on a GPU products are bf16 and
// the residual stream is float32). Norms, biases and score layers are float32 always.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "natslm/models/blocks.h"
#include "natslm/models/model.h"
#include "natslm/models/rotary.h"

namespace natslm::models {

// Throws Error for block options that cannot be.
void check_blocks(const Config& config);

class Decoder : public Model {
 public:
  // With first weights that depend on config and seed alone, all trainable: N(0,
  // initial_deviation), outputs of attention and feed-forward part that / sqrt(2 layers), score
  // layers N(0, 0.02), biases 0, norms 1. Throws Error for a config that cannot be.
  Decoder(const Config& config, uint64_t seed);

  struct Unfilled {
    at::ScalarType matrices = at::kFloat;  // or bfloat16
  };
  // With memory for the weights and nothing in it; frozen but for score layers, which are filled
  // from `seed`.
  Decoder(const Config& config, Unfilled unfilled, uint64_t seed);

  void to(c10::Device device) override;
  TrainingOutput forward(const TrainingInput& input) override;
  at::Tensor output(const at::Tensor& hidden) const override;
  at::Tensor output_matrix() const override;
  void add_adapters(int64_t rank, uint64_t seed) override;
  at::Tensor step(const StepInput& input, cache::KvCache& cache) override;

 private:
  struct Norm {
    at::Tensor weight, bias;
  };
  struct Layer {
    Norm attention_norm, attention_post_norm, mlp_norm, mlp_post_norm;
    AttentionWeights attention;
    at::Tensor mlp_in, mlp_in_bias;    // [hidden or 2 hidden (gate, up), width]
    at::Tensor mlp_out, mlp_out_bias;  // [width, hidden]
  };
  // Makes a parameter: its name, shape and the deviation of its first values (0: all 1 for norms,
  // all 0 for biases).
  struct Maker;
  void make(const Maker& maker);

  at::Tensor norm(const at::Tensor& x, const Norm& norm) const;
  at::Tensor post_norm(at::Tensor x, const Norm& norm) const;
  // fused: with ops::gated_activation.
  at::Tensor feed_forward(const at::Tensor& x, const Layer& layer, bool fused) const;
  // tokens of any shape, positions likewise (undefined where no position is embedded) -> [..,
  // width]
  at::Tensor embed(const at::Tensor& tokens, const at::Tensor& positions) const;
  // One layer of a training pass: x [B, T, width] -> the same; its roles go to the tally.
  at::Tensor layer_forward(int32_t index, const at::Tensor& x, const TrainingInput& input,
                           RoleTally& tally) const;
  // Whether norms and activations of a training pass are ops/fused_layers.h's.
  bool fuses(const TrainingInput& input) const;
  const Rotary& rotary(int32_t layer) const;

  std::vector<Rotary> rotary_;
  at::Tensor embedding_, positions_, output_;  // [vocabulary, width], [context, width]
  Norm final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace natslm::models
