// What every architecture offers: a training pass with sampled roles, and an inference step through
// the evicting cache. Parameters are plain named tensors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/models/block_options.h"
#include "natslm/roles/calibration.h"
#include "natslm/roles/roles.h"

namespace natslm::models {

struct Config {
  std::string architecture = "gpt";
  int32_t layers = 4;
  int32_t width = 128;
  int32_t q_heads = 2;
  int32_t kv_heads = 2;
  int32_t head_dim = 64;
  int32_t hidden = 512;  // of the feed-forward block
  int32_t vocabulary = 2048;
  int32_t context = 512;  // longest sequence the model was built for
  double rope_base = 10000;
  double norm_epsilon = 1e-5;
  double initial_deviation = 0.02;  // of the first weights, see the architecture
  roles::Options roles;
  BlockOptions blocks;              // of the architectures of decoder.h only
  std::vector<int32_t> end_tokens;  // ids that end an answer, as the model's files name them

  // Queries from position + window on cannot read a key of this layer; 0: no such limit.
  int32_t window(int32_t layer) const { return blocks.windows.empty() ? 0 : blocks.windows[layer]; }
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// Whether a parameter of this name is a score layer's: what the roles are made of. Every
// architecture names them so.
constexpr bool is_score_layer(std::string_view name) {
  return name.ends_with("roles.weight");
}

struct TrainingInput {
  at::Tensor tokens;                  // [B, T] int64
  std::optional<at::Tensor> lengths;  // [B] int32; absent: all T
  at::Tensor sequences;  // [B] int64 ids that key the role noise; undefined: 0 .. B - 1
  uint64_t seed = 0;     // of the role noise
  int64_t step = 0;
  at::Tensor device_step;  // 0-dim int64 on the device, read when the kernels run, instead of step;
                           // undefined: `step`
  bool sample = true;      // false: argmax roles without noise, no role gradient
  float bias = 0;          // budget bias, added to the S logit
  at::Tensor biases;       // [B] float, one for each sequence, instead; undefined: `bias`
  at::Tensor price_weights;  // [B] float: what a sequence's price counts in TrainingOutput::price;
                             // undefined: 1. (For texts of the full length.)
  double expected_pairs = 0.2;  // share of causal pairs alive: for the choice of kernels alone
  bool detach_scores = false;   // true: no gradient from the score layers into their input
  bool dense = false;       // true: every key lives and no role is given, as without score layers
  bool want_logits = true;  // false: TrainingOutput::hidden alone
  // Activations of a layer are made a second time in the backward pass instead of being kept: one
  // forward pass more, and the memory of one layer plus [B, T, width] for each. (Architectures of
  // decoder.h; the others keep them.)
  bool recompute = false;
  // Norms, activations and the turning of heads in one pass over memory each, where the
  // architecture can (ops/fused_layers.h); absent: on a GPU. (On the CPU slow: for tests.)
  std::optional<bool> fused;
  bool learn_roles = true;  // false: roles are drawn, but nothing is learned of them
  roles::GradientOptions role_gradient;
};

// Shares of the causal pairs / of the keys, means over sequences, layers and KV heads; 1 for dense.
struct Shares {
  double pairs = 1, kv_end = 1, kv_mean = 1;
};

struct TrainingOutput {
  at::Tensor hidden;  // [B, T, width]: what the output matrix reads (Model::output)
  at::Tensor logits;  // [B, T, V]; undefined if not wanted
  at::Tensor price;   // scalar C of the sampled roles, differentiable; undefined if dense
  Shares sampled;     // of the roles used in this pass
  double argmax_kv_end =
      1;  // KV at end that argmax roles with bias 0 would give: what budget control steers
  std::vector<double> layer_kv_end;  // of the roles used, by layer; empty if dense
};

// Rows of one inference step, see cache::Step.
struct StepInput {
  cache::Step step;
  at::Tensor tokens;           // [rows] int64
  bool last_row_only = false;  // logits of each sequence's last row instead of all rows
};

class TrainingPass;

class Model {
 public:
  Model();
  virtual ~Model();
  const Config& config() const { return config_; }
  // Owned by the model; the tensors' storage is updated in place by training. Names are those of
  // the weight file.
  const NamedTensors& parameters() const { return parameters_; }
  // Moves weights and tables; the tensors of parameters() stay the same objects.
  virtual void to(c10::Device device);
  c10::Device device() const;
  // What budget biases were measured to keep, if a side-car says so; else null.
  const roles::Calibration* calibration() const { return calibration_ ? &*calibration_ : nullptr; }
  void set_calibration(roles::Calibration calibration) { calibration_ = std::move(calibration); }
  virtual TrainingOutput forward(const TrainingInput& input) = 0;
  // Logits [.., V] of TrainingOutput::hidden [.., width] or some of its rows. Differentiable.
  // Throws Error if the architecture does not tell the two apart.
  virtual at::Tensor output(const at::Tensor& hidden) const;
  // [V, width] if output() is its product with `hidden` and nothing else; else undefined.
  virtual at::Tensor output_matrix() const { return {}; }
  // Adds to the attention output of each layer the product of two trainable matrices of this rank
  // (Hu et al. 2021, "LoRA"), at first 0: parameters layers.N.attention.adapter_{down,up}.weight,
  // [rank, Hq * D] and [width, rank]. For training alone: step() does not read them. Throws Error
  // if the architecture has no place for them.
  virtual void add_adapters(int64_t rank, uint64_t seed);
  // A pass with gradients for a GPU, see training_pass.h; the model must outlive it and stay on its
  // device. `type` is that of the matrix products: bfloat16, on the CPU also float32. Throws Error
  // if the architecture has none.
  virtual std::unique_ptr<TrainingPass> training_pass(at::ScalarType type);
  // Appends the rows to the cache and returns logits [rows or sequences, V]. No gradient.
  virtual at::Tensor step(const StepInput& input, cache::KvCache& cache) = 0;
  cache::Shape cache_shape(at::ScalarType dtype = at::kFloat) const {
    cache::Shape shape{config_.layers, config_.q_heads, config_.kv_heads, config_.head_dim, dtype};
    shape.windows = config_.blocks.windows;
    return shape;
  }

 protected:
  Config config_;
  NamedTensors parameters_;

 private:
  std::optional<roles::Calibration> calibration_;
};

}  // namespace natslm::models
