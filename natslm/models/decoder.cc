// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/decoder.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/models/init.h"
#include "natslm/models/models.h"
#include "natslm/models/recompute.h"
#include "natslm/ops/fused_layers.h"
#include "natslm/ops/linear.h"

namespace natslm::models {

using at::Tensor;

namespace {

kernels::GateActivation gate_activation(Activation activation) {
  using enum kernels::GateActivation;
  return activation == Activation::kSilu   ? kSilu
         : activation == Activation::kGelu ? kGelu
                                           : kGeluTanh;
}

}  // namespace

void check_blocks(const Config& config) {
  const BlockOptions& o = config.blocks;
  NATSLM_CHECK(o.rope.size() <= 256, "a model of ", o.rope.size(), " rotary embeddings");
  for (const RopeOptions& rope : o.rope) check(rope, config.head_dim);
  NATSLM_CHECK(o.learned_positions == 0 || config.context <= o.learned_positions,
               "the model has learned ", o.learned_positions, " positions; a context of ",
               config.context, " tokens is out of its reach");
  NATSLM_CHECK(o.windows.empty() || std::ssize(o.windows) == config.layers, o.windows.size(),
               " windows for ", config.layers, " layers");
  for (const int32_t window : o.windows) {
    NATSLM_CHECK(window >= 0, "the window of a layer is ", window, "; 0 means none");
  }
  NATSLM_CHECK(o.rope_of.empty() || std::ssize(o.rope_of) == config.layers, o.rope_of.size(),
               " choices of a rotary embedding for ", config.layers, " layers");
  for (const uint8_t rope : o.rope_of) {
    NATSLM_CHECK(rope < o.rope.size(), "rotary embedding ", int{rope}, " is not among ",
                 o.rope.size());
  }
  NATSLM_CHECK(std::isfinite(o.embedding_scale) && o.embedding_scale > 0 &&
                   std::isfinite(o.attention_scale) && o.attention_scale >= 0 &&
                   std::isfinite(o.logit_soft_cap) && o.logit_soft_cap >= 0,
               "embedding scale ", o.embedding_scale, ", attention scale ", o.attention_scale,
               " or logit soft cap ", o.logit_soft_cap, " cannot be");
}

struct Decoder::Maker {
  // A matrix, a norm's weight, a bias.
  std::function<Tensor(const std::string& name, int64_t rows, int64_t columns, double deviation)>
      matrix;
  std::function<Tensor(const std::string&name, int64_t size)> ones, zeros;
  std::function<Tensor(const std::string& name, int64_t rows, int64_t columns)> scores;
};

void Decoder::make(const Maker& maker) {
  const Config& c = config_;
  const BlockOptions& o = c.blocks;
  const int64_t width = c.width, d = c.head_dim, hq = c.q_heads, hkv = c.kv_heads;
  const double deviation = c.initial_deviation, residual = deviation / std::sqrt(2.0 * c.layers);
  const auto norm = [&](const std::string& name, int64_t size) {
    return Norm{maker.ones(name + ".weight", size),
                o.norm_bias ? maker.zeros(name + ".bias", size) : Tensor()};
  };
  const auto bias = [&](bool wanted, const std::string& name, int64_t size) {
    return wanted ? maker.zeros(name + ".bias", size) : Tensor();
  };
  embedding_ = maker.matrix("embedding.weight", c.vocabulary, width, deviation);
  if (o.learned_positions > 0) {
    positions_ = maker.matrix("positions.weight", o.learned_positions, width, deviation);
  }
  for (int32_t i = 0; i < c.layers; ++i) {
    const std::string layer_name = "layers." + std::to_string(i) + ".";
    const std::string attention = layer_name + "attention.", mlp = layer_name + "mlp.";
    Layer layer;
    layer.attention_norm = norm(layer_name + "attention_norm", width);
    layer.attention.qkv =
        maker.matrix(attention + "qkv.weight", (hq + 2 * hkv) * d, width, deviation);
    layer.attention.qkv_bias = bias(o.qkv_bias, attention + "qkv", (hq + 2 * hkv) * d);
    if (o.qk_norm) {
      layer.attention.q_norm = maker.ones(attention + "q_norm.weight", d);
      layer.attention.k_norm = maker.ones(attention + "k_norm.weight", d);
    }
    layer.attention.out = maker.matrix(attention + "out.weight", width, hq * d, residual);
    layer.attention.out_bias = bias(o.out_bias, attention + "out", width);
    if (c.roles.set != roles::RoleSet::kDense) {
      layer.attention.roles = maker.scores(attention + "roles.weight", roles::kRoles * hkv, width);
    }
    if (o.post_norms) {
      layer.attention_post_norm = norm(layer_name + "attention_post_norm", width);
    }
    layer.mlp_norm = norm(layer_name + "mlp_norm", width);
    const int64_t in = o.gated ? 2 * int64_t{c.hidden} : c.hidden;
    layer.mlp_in = maker.matrix(mlp + "in.weight", in, width, deviation);
    layer.mlp_in_bias = bias(o.mlp_bias, mlp + "in", in);
    layer.mlp_out = maker.matrix(mlp + "out.weight", width, c.hidden, residual);
    layer.mlp_out_bias = bias(o.mlp_bias, mlp + "out", width);
    if (o.post_norms) layer.mlp_post_norm = norm(layer_name + "mlp_post_norm", width);
    layers_.push_back(std::move(layer));
  }
  final_norm_ = norm("final_norm", width);
  output_ = o.tied ? embedding_ : maker.matrix("output.weight", c.vocabulary, width, deviation);

  for (const RopeOptions& rope : o.rope) {
    rotary_.emplace_back(c.head_dim, rope_frequencies(rope, c.head_dim, c.context), c.context);
  }
  if (rotary_.empty()) rotary_.emplace_back(c.head_dim, RopeFrequencies(), c.context);
}

Decoder::Decoder(const Config& config, uint64_t seed) {
  check(config);
  config_ = config;
  const auto parameter = [this](const std::string& name, Tensor value) {
    value.requires_grad_(true);
    parameters_.emplace_back(name, value);
    return value;
  };
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns,
                          double deviation) {
    return parameter(name, normal({rows, columns}, deviation, seed, name));
  };
  make({.matrix = matrix,
        .ones = [&](const std::string& name,
                    int64_t size) { return parameter(name, at::ones({size}, at::kFloat)); },
        .zeros = [&](const std::string& name,
                     int64_t size) { return parameter(name, at::zeros({size}, at::kFloat)); },
        .scores = [&](const std::string& name, int64_t rows,
                      int64_t columns) { return matrix(name, rows, columns, 0.02); }});
}

Decoder::Decoder(const Config& config, Unfilled unfilled, uint64_t seed) {
  check(config);
  config_ = config;
  const auto empty = [this](const std::string& name, at::IntArrayRef shape, at::ScalarType type) {
    const Tensor value = at::empty(shape, type);
    parameters_.emplace_back(name, value);
    return value;
  };
  const auto vector = [&](const std::string& name, int64_t size) {
    return empty(name, {size}, at::kFloat);
  };
  make({.matrix =
            [&](const std::string& name, int64_t rows, int64_t columns, double) {
              return empty(name, {rows, columns}, unfilled.matrices);
            },
        .ones = vector,
        .zeros = vector,
        .scores =
            [&](const std::string& name, int64_t rows, int64_t columns) {
              Tensor value = normal({rows, columns}, 0.02, seed, name);
              value.requires_grad_(true);
              parameters_.emplace_back(name, value);
              return value;
            }});
}

void Decoder::to(c10::Device device) {
  Model::to(device);
  for (Rotary& rotary : rotary_) rotary.to(device);
}

const Rotary& Decoder::rotary(int32_t layer) const {
  const BlockOptions& o = config_.blocks;
  return rotary_[o.rope_of.empty() ? 0 : o.rope_of[layer]];
}

Tensor Decoder::norm(const Tensor& x, const Norm& norm) const {
  if (config_.blocks.norm == NormKind::kLayer) {
    return at::layer_norm(x, {config_.width}, norm.weight,
                          norm.bias.defined() ? std::optional(norm.bias) : std::nullopt,
                          config_.norm_epsilon);
  }
  return at::rms_norm(x, {config_.width}, norm.weight, config_.norm_epsilon);
}

Tensor Decoder::post_norm(Tensor x, const Norm& norm) const {
  return norm.weight.defined() ? this->norm(x.to(at::kFloat), norm) : std::move(x);
}

Tensor Decoder::feed_forward(const Tensor& x, const Layer& layer, bool fused) const {
  const BlockOptions& o = config_.blocks;
  const auto activation = [&](const Tensor& h) {
    return o.activation == Activation::kSilu   ? at::silu(h)
           : o.activation == Activation::kGelu ? at::gelu(h)
                                               : at::gelu(h, "tanh");
  };
  const Tensor in = ops::linear(x, layer.mlp_in, layer.mlp_in_bias);
  const int64_t hidden = config_.hidden;
  const Tensor inner = o.gated && fused ? ops::gated_activation(in, gate_activation(o.activation))
                       : o.gated
                           ? activation(in.narrow(-1, 0, hidden)) * in.narrow(-1, hidden, hidden)
                           : activation(in);
  return ops::linear(inner, layer.mlp_out, layer.mlp_out_bias);
}

Tensor Decoder::embed(const Tensor& tokens, const Tensor& positions) const {
  Tensor x = at::embedding(embedding_, tokens).to(at::kFloat);
  if (config_.blocks.embedding_scale != 1) x = x * config_.blocks.embedding_scale;
  if (positions.defined()) x = x + at::embedding(positions_, positions).to(at::kFloat);
  return x;
}

Tensor Decoder::output(const Tensor& hidden) const {
  const Tensor raw = ops::linear(hidden, output_).to(at::kFloat);
  const double cap = config_.blocks.logit_soft_cap;
  return cap == 0 ? raw : at::tanh(raw / cap) * cap;
}

Tensor Decoder::output_matrix() const {
  return config_.blocks.logit_soft_cap == 0 ? output_ : Tensor();
}

bool Decoder::fuses(const TrainingInput& input) const {
  if (!input.fused.value_or(!device().is_cpu())) return false;
  const Layer& layer = layers_.front();
  const at::ScalarType type = layer.mlp_in.scalar_type();
  const bool frozen = !layer.mlp_in.requires_grad() && !layer.mlp_norm.weight.requires_grad();
  const bool fits = device().is_cpu() || (type == at::kBFloat16 && config_.width % 8 == 0 &&
                                          config_.width <= 8192 && config_.hidden % 8 == 0);
  return frozen && fits && !config_.blocks.norm_bias && !config_.blocks.post_norms;
}

Tensor Decoder::layer_forward(int32_t index, const Tensor& in, const TrainingInput& input,
                              RoleTally& tally) const {
  const Layer& layer = layers_[index];
  if (fuses(input)) {
    const at::ScalarType type = layer.mlp_in.scalar_type();
    const ops::NormOptions options = {.epsilon = config_.norm_epsilon,
                                      .centered = config_.blocks.norm == NormKind::kLayer};
    const ops::SumAndNorm first = ops::add_norm(in, {}, layer.attention_norm.weight, options, type);
    const Tensor attended =
        attention_block(first.y, layer.attention, config_, rotary(index), index, input, tally);
    const ops::SumAndNorm second =
        ops::add_norm(first.sum, attended.to(type), layer.mlp_norm.weight, options, type);
    return second.sum + feed_forward(second.y, layer, /*fused=*/true);
  }
  const Tensor attended = attention_block(norm(in, layer.attention_norm), layer.attention, config_,
                                          rotary(index), index, input, tally);
  const Tensor x = in + post_norm(attended, layer.attention_post_norm);
  return x + post_norm(feed_forward(norm(x, layer.mlp_norm), layer, /*fused=*/false),
                       layer.mlp_post_norm);
}

TrainingOutput Decoder::forward(const TrainingInput& input) {
  check_input(input, config_);
  RoleTally tally;
  Tensor x = embed(input.tokens, config_.blocks.learned_positions > 0
                                     ? at::arange(input.tokens.size(1), input.tokens.options())
                                     : Tensor());
  for (int32_t i = 0; i < config_.layers; ++i) {
    x = input.recompute && c10::GradMode::is_enabled()
            ? recomputed(x, tally,
                         [this, i, input](const Tensor& in, RoleTally& of_layer) {
                           return layer_forward(i, in, input, of_layer);
                         })
            : layer_forward(i, x, input, tally);
  }
  TrainingOutput result;
  result.hidden = norm(x, final_norm_);
  if (input.want_logits) result.logits = output(result.hidden);
  tally.write(result);
  return result;
}

void Decoder::add_adapters(int64_t rank, uint64_t seed) {
  const int64_t in = int64_t{config_.q_heads} * config_.head_dim;
  NATSLM_CHECK(rank >= 1, "adapters of rank ", rank, "; it must be at least 1");
  for (int32_t i = 0; i < config_.layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".attention.adapter_";
    const auto add = [&](const std::string& name, Tensor values) {
      values = values.to(device()).requires_grad_(true);
      parameters_.emplace_back(name, values);
      return values;
    };
    AttentionWeights& weights = layers_[i].attention;
    weights.adapter_down =
        add(prefix + "down.weight",
            normal({rank, in}, 1 / std::sqrt(static_cast<double>(in)), seed, prefix + "down"));
    weights.adapter_up = add(prefix + "up.weight", at::zeros({config_.width, rank}, at::kFloat));
  }
}

Tensor Decoder::step(const StepInput& input, cache::KvCache& cache) {
  const c10::NoGradGuard no_grad;
  check_input(input, cache, config_);
  Tensor x = embed(input.tokens, config_.blocks.learned_positions > 0
                                     ? row_positions(input.step, cache).to(input.tokens.device())
                                     : Tensor());
  for (int32_t i = 0; i < config_.layers; ++i) {
    const Layer& layer = layers_[i];
    const Tensor attended = attention_step(norm(x, layer.attention_norm), layer.attention, config_,
                                           rotary(i), i, input.step, cache);
    x = x + post_norm(attended, layer.attention_post_norm);
    x = x + post_norm(feed_forward(norm(x, layer.mlp_norm), layer, /*fused=*/false),
                      layer.mlp_post_norm);
  }
  cache.finish_step(input.step);
  if (input.last_row_only) x = x.index_select(0, last_rows(input.step).to(x.device()));
  return output(norm(x, final_norm_));
}

}  // namespace natslm::models
