// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/blocks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "natslm/base/error.h"
#include "natslm/ops/attention.h"
#include "natslm/ops/linear.h"
#include "natslm/roles/assign_roles.h"
#include "natslm/roles/assignment.h"

namespace natslm::models {
namespace {

using at::Tensor;

double attention_scale(const Config& config) {
  const double own = config.blocks.attention_scale;
  return own != 0 ? own : 1.0 / std::sqrt(static_cast<double>(config.head_dim));
}

// Last query that the model's own window lets read each key, [T] int32.
Tensor window_ends(int64_t tokens, int32_t window, const Tensor& like) {
  return at::arange(tokens, at::TensorOptions(at::kInt).device(like.device())) + (window - 1);
}

// Projections of the heads [.., (Hq + 2 Hkv) * D + rest] with the norms of query and key heads, if
// the model has them.
Tensor with_head_norms(const Tensor& fused, const AttentionWeights& weights, const Config& config) {
  if (!weights.q_norm.defined()) return fused;
  const int64_t d = config.head_dim, last = fused.dim() - 1;
  const auto normed = [&](int64_t first, int64_t heads, const Tensor& weight) {
    const Tensor part = fused.narrow(last, first * d, heads * d);
    const Tensor by_head = part.unflatten(last, {heads, d}).to(at::kFloat);
    return at::rms_norm(by_head, {d}, weight, config.norm_epsilon)
        .flatten(last)
        .to(fused.scalar_type());
  };
  const int64_t q = config.q_heads, kv = config.kv_heads, rest = (q + kv) * d;
  return at::cat({normed(0, q, weights.q_norm), normed(q, kv, weights.k_norm),
                  fused.narrow(last, rest, fused.size(last) - rest)},
                 last);
}

void check_ids(const Tensor& tokens, const Config& config) {
  NATSLM_CHECK(tokens.scalar_type() == at::kLong, "tokens must be int64, got ",
               c10::toString(tokens.scalar_type()));
  // On a GPU a look at the values would wait for the device: whoever sent them has looked.
  if (tokens.numel() == 0 || !tokens.is_cpu()) return;
  const auto [lowest, highest] = at::aminmax(tokens);
  const int64_t low = lowest.item<int64_t>(), high = highest.item<int64_t>();
  NATSLM_CHECK(low >= 0 && high < config.vocabulary, "token id ", low < 0 ? low : high,
               " is outside the model's vocabulary of ", config.vocabulary,
               "; use the model's own tokenizer");
}

// Mean over the sequences of weight * price, as assign_roles has it without weights: the share of
// causal pairs that the one-hot roles keep alive. Differentiable in onehot [B, Hkv, T, R]; horizons
// [R, B, Hkv, T].
Tensor weighted_price(const Tensor& onehot, const Tensor& horizons, const Tensor& weights) {
  const int64_t t = onehot.size(2);
  const Tensor position = at::arange(t, at::TensorOptions(at::kInt).device(horizons.device()));
  const Tensor pairs = (horizons.clamp_max(t - 1) - position + 1).to(at::kFloat);
  const double all = 0.5 * static_cast<double>(t) * static_cast<double>(t + 1);
  const Tensor of_head = (onehot.permute({3, 0, 1, 2}) * pairs).sum(at::IntArrayRef({0, 3})) / all;
  return (of_head.mean(1) * weights).mean();
}

}  // namespace

// Causal attention to every key, which ops:: gives to LibTorch's kernels where those are faster. On
// the CPU our own took 0.47 to 0.82 of the CPU time of
// LibTorch's (forward and backward, T 512 to 4,096, heads of 64 and 128, one thread), and it leaves
// out what lies past a length.
Tensor dense_attention(const Heads& heads, const Config& config, const TrainingInput& input) {
  return ops::attention(heads.q, heads.k, heads.v, {}, input.lengths, attention_scale(config)).out;
}

Tensor windowed_attention(const Heads& heads, const Config& config, int32_t window,
                          const TrainingInput& input) {
  const int64_t b = heads.k.size(0), hkv = heads.k.size(1), t = heads.k.size(2);
  const Tensor last = window_ends(t, window, heads.k).expand({b, hkv, t}).contiguous();
  return ops::attention(heads.q, heads.k, heads.v, last, input.lengths, attention_scale(config))
      .out;
}

RoleAttention role_attention(const Heads& heads, const Tensor& logits, const Config& config,
                             int32_t layer, const TrainingInput& input) {
  std::optional<roles::Noise> noise;
  if (input.sample) {
    noise = {.seed = input.seed,
             .step = input.step,
             .layer = layer,
             .sequences = input.sequences,
             .device_step = input.device_step};
  }
  Tensor bias = input.biases;
  if (!bias.defined() && input.bias != 0) {
    bias = at::full({logits.size(0)}, input.bias,
                    logits.options().dtype(at::kFloat).requires_grad(false));
  }
  const roles::AssignedRoles assigned =
      roles::assign_roles(logits, config.roles, input.lengths, noise, bias);
  Tensor last = assigned.last, horizons = assigned.horizons;
  ops::AttentionHints hints = {.order = assigned.order,
                               .ends = assigned.ends,
                               .reach = assigned.reach,
                               .density = input.expected_pairs};
  if (const int32_t window = config.window(layer); window > 0) {
    // No role lets a query read what the model itself hides from it. Keys of any role now end
    // like window keys, which is not the order of `hints`.
    const Tensor ends = window_ends(last.size(2), window, last);
    last = at::minimum(last, ends);
    horizons = at::minimum(horizons, ends);
    hints = {.density = input.expected_pairs};
  }
  std::optional<ops::RoleInputs> role_inputs;
  if (assigned.onehot.requires_grad()) {
    role_inputs = {.onehot = assigned.onehot,
                   .horizons = horizons,
                   .limit_factor = input.role_gradient.limit_factor,
                   .causal_normalizer = input.role_gradient.causal_normalizer,
                   .end_term = input.role_gradient.end_term};
  }
  const Tensor out =
      ops::attention(heads.q, heads.k, heads.v, last, input.lengths, attention_scale(config),
                     role_inputs, /*want_mass=*/false, hints)
          .out;
  const Tensor price = input.price_weights.defined()
                           ? weighted_price(assigned.onehot, assigned.horizons, input.price_weights)
                           : assigned.price;
  return {.out = out, .price = price, .shares = assigned.shares};
}

void RoleTally::add(const Tensor& price, const Tensor& shares) {
  prices_.push_back(price);
  shares_.push_back(shares);
}

void RoleTally::write(TrainingOutput& output) const {
  if (prices_.empty()) return;
  output.price = at::stack(prices_).mean();
  // One read for all numbers: on a GPU it is the only wait.
  const Tensor of_layers = at::stack(shares_).mean({1, 2}, false, at::kDouble).cpu().contiguous();
  double share[roles::kShares] = {};
  for (int64_t layer = 0; layer < of_layers.size(0); ++layer) {
    const double* of = of_layers.const_data_ptr<double>() + layer * roles::kShares;
    for (int i = 0; i < roles::kShares; ++i)
      share[i] += of[i] / static_cast<double>(of_layers.size(0));
    output.layer_kv_end.push_back(of[roles::kKvEnd]);
  }
  output.sampled = {share[roles::kPairs], share[roles::kKvEnd], share[roles::kKvMean]};
  output.argmax_kv_end = share[roles::kArgmaxKvEnd];
}

Tensor attention_block(const Tensor& normed, const AttentionWeights& weights, const Config& config,
                       const Rotary& rotary, int32_t layer, const TrainingInput& input,
                       RoleTally& tally) {
  const bool dense = config.roles.set == roles::RoleSet::kDense || input.dense;
  // The scores ride along in the projection's matrix product, unless their input is cut off or the
  // product is of less than float32.
  const bool ride = !dense && !input.detach_scores && normed.scalar_type() == at::kFloat &&
                    weights.qkv.scalar_type() == at::kFloat && !weights.qkv_bias.defined();
  const Tensor projection = ride ? at::cat({weights.qkv, weights.roles}) : weights.qkv;
  const Tensor fused =
      with_head_norms(ops::linear(normed, projection, weights.qkv_bias), weights, config);
  const Heads heads = rotary.split_heads(fused, config.q_heads, config.kv_heads);
  Tensor out;
  if (dense) {
    const int32_t window = config.window(layer);
    out = window > 0 && window < normed.size(1) ? windowed_attention(heads, config, window, input)
                                                : dense_attention(heads, config, input);
  } else {
    Tensor logits = heads.rest;
    if (!ride) {
      const Tensor from = input.detach_scores ? normed.detach() : normed;
      logits = at::linear(from.to(at::kFloat), weights.roles.to(at::kFloat));
    }
    if (!input.learn_roles) logits = logits.detach();
    const RoleAttention attention = role_attention(heads, logits, config, layer, input);
    tally.add(attention.price, attention.shares);
    out = attention.out;
  }
  const int64_t b = normed.size(0), t = normed.size(1);
  const Tensor rows =
      out.transpose(1, 2).reshape({b, t, int64_t{config.q_heads} * config.head_dim});
  const Tensor result = ops::linear(rows, weights.out, weights.out_bias);
  if (!weights.adapter_down.defined()) return result;
  return result +
         at::linear(at::linear(rows.to(at::kFloat), weights.adapter_down), weights.adapter_up);
}

Tensor attention_step(const Tensor& normed, const AttentionWeights& weights, const Config& config,
                      const Rotary& rotary, int32_t layer, const cache::Step& step,
                      cache::KvCache& cache) {
  const int64_t rows = normed.size(0), d = config.head_dim, hq = config.q_heads,
                hkv = config.kv_heads;
  const Tensor fused =
      with_head_norms(ops::linear(normed, weights.qkv, weights.qkv_bias), weights, config);
  const auto part = [&](int64_t first, int64_t heads) {
    return fused.narrow(1, first * d, heads * d).view({rows, heads, d});
  };
  cache::LayerInput in;
  in.q = part(0, hq);
  in.k = part(hq, hkv);
  in.v = part(hq + hkv, hkv);
  in.hidden = normed;
  in.score_weight = weights.roles;
  if (rotary.turns()) {
    in.rotate = [&rotary](const Tensor& x, const Tensor& positions) {
      return rotary.rotate(x, positions);
    };
  }
  in.rotary_positions = config.context;
  in.scale = attention_scale(config);
  return ops::linear(cache.attend(layer, step, in).reshape({rows, hq * d}), weights.out,
                     weights.out_bias);
}

void check_input(const TrainingInput& input, const Config& config) {
  NATSLM_CHECK(input.tokens.dim() == 2, "tokens must be [B, T], got ", input.tokens.sizes());
  const int64_t b = input.tokens.size(0), t = input.tokens.size(1);
  NATSLM_CHECK(b > 0 && t > 0, "there are no tokens: [B, T] is ", input.tokens.sizes());
  NATSLM_CHECK(t <= config.context, "a sequence of ", t,
               " tokens is longer than the model's context of ", config.context,
               " tokens; shorten it or train a model with a longer context");
  check_ids(input.tokens, config);
  const auto check_batch = [&](const Tensor& x, const char* what, at::ScalarType type) {
    NATSLM_CHECK(x.dim() == 1 && x.size(0) == b && x.scalar_type() == type, what, " must be ",
                 c10::toString(type), " [", b, "], got ", c10::toString(x.scalar_type()), " ",
                 x.sizes());
  };
  if (input.sequences.defined()) check_batch(input.sequences, "sequences", at::kLong);
  if (input.biases.defined()) check_batch(input.biases, "biases", at::kFloat);
  if (input.price_weights.defined()) check_batch(input.price_weights, "price_weights", at::kFloat);
  if (!input.lengths) return;
  check_batch(*input.lengths, "lengths", at::kInt);
  if (!input.lengths->is_cpu()) return;
  const auto [lowest, highest] = at::aminmax(*input.lengths);
  NATSLM_CHECK(lowest.item<int>() >= 0 && highest.item<int>() <= t, "lengths from ",
               lowest.item<int>(), " to ", highest.item<int>(), " do not fit rows of ", t,
               " tokens");
}

void check_input(const StepInput& input, const cache::KvCache& cache, const Config& config) {
  const cache::Step& step = input.step;
  NATSLM_CHECK(!step.slots.empty() && step.row_start.size() == step.slots.size() + 1, "a step of ",
               step.slots.size(), " sequences needs one more row start, got ",
               step.row_start.size());
  NATSLM_CHECK(input.tokens.dim() == 1 && input.tokens.size(0) == step.row_start.back(),
               "a step of ", step.row_start.back(), " rows got tokens ", input.tokens.sizes());
  check_ids(input.tokens, config);
  if (cache.policy().renumbers()) return;
  for (size_t s = 0; s < step.slots.size(); ++s) {
    const int64_t end =
        int64_t{cache.length(step.slots[s])} + step.row_start[s + 1] - step.row_start[s];
    NATSLM_CHECK(end <= config.context, "a sequence of ", end,
                 " tokens is longer than the model's context of ", config.context,
                 " tokens; shorten it or use a policy that renumbers positions");
  }
}

Tensor row_positions(const cache::Step& step, const cache::KvCache& cache) {
  Tensor positions = at::empty({step.row_start.back()}, at::kLong);
  int64_t* of_row = positions.mutable_data_ptr<int64_t>();
  for (size_t s = 0; s < step.slots.size(); ++s) {
    std::iota(of_row + step.row_start[s], of_row + step.row_start[s + 1],
              int64_t{cache.length(step.slots[s])});
  }
  return positions;
}

Tensor last_rows(const cache::Step& step) {
  Tensor rows = at::empty({static_cast<int64_t>(step.slots.size())}, at::kLong);
  for (size_t s = 0; s < step.slots.size(); ++s) {
    rows.mutable_data_ptr<int64_t>()[s] = step.row_start[s + 1] - 1;
  }
  return rows;
}

}  // namespace natslm::models
