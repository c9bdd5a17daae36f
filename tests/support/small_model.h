// A model small enough to reason about, with everything the engine and the evaluations touch: two
// layers of grouped-query attention with RoPE through the cache, and a plain dense pass as the
// oracle. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/lifetime.h"
#include "natslm/cache/kv_cache.h"
#include "natslm/models/model.h"

namespace natslm::testing {

// Numbers in (-range, range) that depend on the seed alone.
inline at::Tensor noise(at::IntArrayRef shape, uint64_t seed, double range) {
  at::Tensor values = at::empty(shape, at::kFloat);
  float* data = values.mutable_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    const auto words =
        philox({static_cast<uint32_t>(seed), 7}, {static_cast<uint32_t>(i), 0, 0, 0});
    data[i] = static_cast<float>((2.0 * open_unit(words[0]) - 1.0) * range);
  }
  return values;
}

class SmallModel final : public models::Model {
 public:
  explicit SmallModel(int32_t context = 64, uint64_t seed = 1) {
    config_.architecture = "small";
    config_.layers = 2;
    config_.width = 32;
    config_.q_heads = 4;
    config_.kv_heads = 2;
    config_.head_dim = 8;
    config_.vocabulary = 50;
    config_.context = context;
    const int64_t width = config_.width, q = 32, kv = 16;
    embedding_ = noise({config_.vocabulary, width}, seed, 1.0);
    for (int layer = 0; layer < config_.layers; ++layer) {
      const uint64_t base = seed + 100 * (layer + 1);
      layers_.push_back({noise({width, q}, base, 0.5), noise({width, kv}, base + 1, 0.5),
                         noise({width, kv}, base + 2, 0.5), noise({q, width}, base + 3, 0.5),
                         noise({3 * config_.kv_heads, width}, base + 4, 0.5)});
    }
  }

  // Dense attention, no cache: logits [B, T, V].
  models::TrainingOutput forward(const models::TrainingInput& input) override {
    const int64_t batch = input.tokens.size(0), count = input.tokens.size(1);
    std::vector<int32_t> position(count);
    for (int64_t i = 0; i < count; ++i) position[i] = static_cast<int32_t>(i);
    const at::Tensor positions = at::from_blob(position.data(), {count}, at::kInt).clone();
    const at::Tensor causal = at::ones({count, count}, at::kBool).tril();
    at::Tensor logits = at::empty({batch, count, config_.vocabulary}, at::kFloat);
    for (int64_t b = 0; b < batch; ++b) {
      at::Tensor x = embedding_.index_select(0, input.tokens.select(0, b));
      for (const Layer& layer : layers_) {
        const at::Tensor q = rotate(x.matmul(layer.q).view({count, 4, 8}), positions);
        const at::Tensor k = rotate(x.matmul(layer.k).view({count, 2, 8}), positions);
        const at::Tensor v = x.matmul(layer.v).view({count, 2, 8});
        std::vector<at::Tensor> heads;
        for (int64_t head = 0; head < 4; ++head) {
          const at::Tensor scores = q.select(1, head).matmul(k.select(1, head / 2).t()) * kScale;
          const at::Tensor hidden = at::full_like(scores, -INFINITY);
          heads.push_back(
              at::where(causal, scores, hidden).softmax(-1).matmul(v.select(1, head / 2)));
        }
        x = x + at::cat(heads, 1).matmul(layer.o);
      }
      logits.select(0, b).copy_(head(x));
    }
    models::TrainingOutput output;
    output.logits = logits;
    return output;
  }

  at::Tensor step(const models::StepInput& input, cache::KvCache& cache) override {
    rows_of_steps.push_back(input.tokens.size(0));
    const int64_t rows = input.tokens.size(0);
    at::Tensor x = embedding_.index_select(0, input.tokens);
    for (int32_t i = 0; i < config_.layers; ++i) {
      const Layer& layer = layers_[i];
      cache::LayerInput in;
      in.q = x.matmul(layer.q).view({rows, 4, 8});
      in.k = x.matmul(layer.k).view({rows, 2, 8});
      in.v = x.matmul(layer.v).view({rows, 2, 8});
      in.hidden = x;
      in.score_weight = layer.score;
      in.rotate = rotate;
      in.scale = kScale;
      x = x + cache.attend(i, input.step, in).reshape({rows, 32}).matmul(layer.o);
    }
    cache.finish_step(input.step);
    if (input.last_row_only) {
      std::vector<int64_t> last;
      for (size_t s = 1; s < input.step.row_start.size(); ++s)
        last.push_back(input.step.row_start[s] - 1);
      x = x.index_select(
          0, at::from_blob(last.data(), {static_cast<int64_t>(last.size())}, at::kLong));
    }
    return head(x);
  }

  std::vector<int64_t> rows_of_steps;  // tokens of each step so far

 private:
  struct Layer {
    at::Tensor q, k, v, o, score;
  };
  static constexpr double kScale = 0.35;

  at::Tensor head(const at::Tensor& x) const {
    return (x / x.norm(2, -1, true) * 8).matmul(embedding_.t());
  }

  // RoPE over pairs (c, c + D/2).
  static at::Tensor rotate(const at::Tensor& x, const at::Tensor& positions) {
    const int64_t count = x.size(0), half = x.size(2) / 2;
    at::Tensor angle = at::empty({count, 1, half}, at::kFloat);
    float* data = angle.mutable_data_ptr<float>();
    const at::Tensor where = positions.contiguous();
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < half; ++c) {
        data[i * half + c] = static_cast<float>(where.const_data_ptr<int32_t>()[i] *
                                                std::pow(100.0, -static_cast<double>(c) / half));
      }
    }
    const at::Tensor a = x.slice(2, 0, half), b = x.slice(2, half);
    return at::cat({a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()}, 2);
  }

  at::Tensor embedding_;
  std::vector<Layer> layers_;
};

// Lifetimes that differ by layer, head and position, ends that only a later token sets included:
// token 0 and every eleventh live for ever, some until the next of those, the others for a few
// steps.
class Patchwork : public cache::Policy {
 public:
  std::string spec() const override { return "patchwork"; }
  static int role(int32_t layer, int32_t head, int32_t position) {
    if ((position + layer + 3 * head) % 11 == 0 || position == 0) return 0;
    return mix64(position * 31 + layer * 7 + head) % 3 == 0 ? 1 : 2;
  }
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override {
    int32_t* last = fresh.last.mutable_data_ptr<int32_t>();
    const int64_t count = fresh.last.size(1);
    for (int32_t head = 0; head < static_cast<int32_t>(stored.size()); ++head) {
      for (int64_t row = 0; row < count; ++row) {
        const int32_t position = fresh.first_position + static_cast<int32_t>(row);
        const int kind = role(fresh.layer, head, position);
        int32_t* mine = last + head * count;
        mine[row] = kind == 0 ? kForever : kind == 1 ? kOpenEnded : position + 5;
        if (kind != 0) continue;
        cache::end_open(stored[head], position);
        for (int64_t before = 0; before < row; ++before) {
          if (mine[before] == kOpenEnded) mine[before] = position;
        }
      }
    }
  }
  // The meaning in one line a role, for brute force: whether query i can read key j.
  static bool readable(int32_t layer, int32_t head, int32_t i, int32_t j) {
    if (j > i) return false;
    const int kind = role(layer, head, j);
    if (kind == 0) return true;
    if (kind == 2) return i <= j + 5;
    for (int32_t next = j + 1; next < i; ++next) {
      if (role(layer, head, next) == 0) return false;
    }
    return true;
  }
};

// `count` token ids that depend on the seed alone.
inline std::vector<int32_t> some_tokens(int64_t count, uint64_t seed, int32_t vocabulary = 50) {
  std::vector<int32_t> tokens(count);
  for (int64_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<int32_t>(mix64(seed * 1000003 + i) % vocabulary);
  }
  return tokens;
}

}  // namespace natslm::testing
