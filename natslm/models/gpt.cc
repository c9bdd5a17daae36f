// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/gpt.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <utility>

#include "natslm/models/gpt_training_pass.h"
#include "natslm/models/init.h"
#include "natslm/models/models.h"

namespace natslm::models {

using at::Tensor;

Gpt::Gpt(const Config& config, uint64_t seed)
    : rotary_((check(config), config.head_dim), config.rope_base, config.context) {
  config_ = config;
  const int64_t width = config.width, d = config.head_dim, hq = config.q_heads,
                hkv = config.kv_heads;
  const double deviation = config.initial_deviation,
               residual = deviation / std::sqrt(2.0 * config.layers);
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns, double sd) {
    return parameter(name, normal({rows, columns}, sd, seed, name));
  };
  const auto norm = [&](const std::string& name) {
    return parameter(name, at::ones({width}, at::kFloat));
  };

  weights_.embedding = matrix("embedding.weight", config.vocabulary, width, deviation);
  for (int32_t i = 0; i < config.layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    Layer layer;
    layer.attention_norm = norm(prefix + "attention_norm.weight");
    layer.attention.qkv =
        matrix(prefix + "attention.qkv.weight", (hq + 2 * hkv) * d, width, deviation);
    layer.attention.out = matrix(prefix + "attention.out.weight", width, hq * d, residual);
    if (config.roles.set != roles::RoleSet::kDense) {
      layer.attention.roles =
          matrix(prefix + "attention.roles.weight", roles::kRoles * hkv, width, 0.02);
    }
    layer.mlp_norm = norm(prefix + "mlp_norm.weight");
    layer.mlp_in = matrix(prefix + "mlp.in.weight", config.hidden, width, deviation);
    layer.mlp_out = matrix(prefix + "mlp.out.weight", width, config.hidden, residual);
    weights_.layers.push_back(std::move(layer));
  }
  weights_.final_norm = norm("final_norm.weight");
}

Tensor Gpt::parameter(const std::string& name, Tensor value) {
  value.requires_grad_(true);
  parameters_.emplace_back(name, value);
  return value;
}

Tensor Gpt::norm(const Tensor& x, const Tensor& weight) const {
  return at::layer_norm(x, {config_.width}, weight, {}, config_.norm_epsilon);
}

Tensor Gpt::feed_forward(const Tensor& x, const Layer& layer) const {
  return at::linear(at::gelu(at::linear(norm(x, layer.mlp_norm), layer.mlp_in)), layer.mlp_out);
}

void Gpt::to(c10::Device device) {
  Model::to(device);
  rotary_.to(device);
}

std::unique_ptr<TrainingPass> Gpt::training_pass(at::ScalarType type) {
  return make_gpt_training_pass(config_, weights_, rotary_, parameters_, type);
}

TrainingOutput Gpt::forward(const TrainingInput& input) {
  check_input(input, config_);
  RoleTally tally;
  Tensor x = at::embedding(weights_.embedding, input.tokens);
  for (int32_t i = 0; i < config_.layers; ++i) {
    const Layer& layer = weights_.layers[i];
    x = x + attention_block(norm(x, layer.attention_norm), layer.attention, config_, rotary_, i,
                            input, tally);
    x = x + feed_forward(x, layer);
  }
  TrainingOutput result;
  result.hidden = norm(x, weights_.final_norm);
  if (input.want_logits) result.logits = output(result.hidden);
  tally.write(result);
  return result;
}

Tensor Gpt::output(const Tensor& hidden) const {
  return at::linear(hidden, weights_.embedding);
}

Tensor Gpt::step(const StepInput& input, cache::KvCache& cache) {
  const c10::NoGradGuard no_grad;
  check_input(input, cache, config_);
  Tensor x = at::embedding(weights_.embedding, input.tokens);
  for (int32_t i = 0; i < config_.layers; ++i) {
    const Layer& layer = weights_.layers[i];
    x = x + attention_step(norm(x, layer.attention_norm), layer.attention, config_, rotary_, i,
                           input.step, cache);
    x = x + feed_forward(x, layer);
  }
  cache.finish_step(input.step);
  if (input.last_row_only) x = x.index_select(0, last_rows(input.step).to(x.device()));
  return output(norm(x, weights_.final_norm));
}

}  // namespace natslm::models
