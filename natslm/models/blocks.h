// The parts that architectures share: attention with roles while training, attention through the
// evicting cache while generating, and what the roles of all layers add up to.
//
// Weights are [out, in], as in weight files.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/models/model.h"
#include "natslm/models/rotary.h"

namespace natslm::models {

struct AttentionWeights {
  at::Tensor qkv;    // [(Hq + 2 Hkv) * D, width]: query heads, key heads, value heads
  at::Tensor out;    // [width, Hq * D]
  at::Tensor roles;  // [3 * Hkv, width], row 3 * head + role; undefined if dense
  // A low-rank addition to `out`, the product up x down, while it is trained; undefined else.
  at::Tensor adapter_down, adapter_up;  // [rank, Hq * D], [width, rank]
  // Of pretrained models; undefined where there is none. float32.
  at::Tensor qkv_bias, out_bias;  // as long as the matrices have rows
  at::Tensor q_norm, k_norm;      // [D]: RMS norm of each head before it is turned
};

// Causal attention to every key. out [B, Hq, T, D], in memory [B, T, Hq, D] where it can be.
at::Tensor dense_attention(const Heads& heads, const Config& config, const TrainingInput& input);
// The same to the `window` newest keys, the query's own included.
at::Tensor windowed_attention(const Heads& heads, const Config& config, int32_t window,
                              const TrainingInput& input);

struct RoleAttention {
  at::Tensor out;            // [B, Hq, T, D], in memory [B, T, Hq, D]
  at::Tensor price, shares;  // of roles::AssignedRoles
};
// Attention to the keys that live by the roles drawn from the score logits [B, T, 3 * Hkv].
// Differentiable in heads and logits.
RoleAttention role_attention(const Heads& heads, const at::Tensor& logits, const Config& config,
                             int32_t layer, const TrainingInput& input);

// Price and shares of the layers so far.
class RoleTally {
 public:
  void add(const at::Tensor& price, const at::Tensor& shares);
  // Means over the layers; leaves a dense model's output as it is.
  void write(TrainingOutput& output) const;
  // One for each layer that was added.
  const std::vector<at::Tensor>& prices() const { return prices_; }
  const std::vector<at::Tensor>& shares() const { return shares_; }

 private:
  std::vector<at::Tensor> prices_, shares_;
};

// normed [B, T, width] -> [B, T, width], with the roles that `input` asks for and the layer's own
// window. input.lengths is [B] int32 on normed's device or absent.
at::Tensor attention_block(const at::Tensor& normed, const AttentionWeights& weights,
                           const Config& config, const Rotary& rotary, int32_t layer,
                           const TrainingInput& input, RoleTally& tally);

// normed [rows, width] -> [rows, width] through the cache.
at::Tensor attention_step(const at::Tensor& normed, const AttentionWeights& weights,
                          const Config& config, const Rotary& rotary, int32_t layer,
                          const cache::Step& step, cache::KvCache& cache);

// Throws Error naming what does not fit: tokens [B, T] int64 inside the vocabulary, T within the
// context, lengths [B] in 0 .. T, sequences and biases [B].
void check_input(const TrainingInput& input, const Config& config);
// Likewise for a step: rows, vocabulary, and positions within the context (unless the cache's
// policy renumbers positions).
void check_input(const StepInput& input, const cache::KvCache& cache, const Config& config);

// Position of each row, [rows] int64 on the CPU.
at::Tensor row_positions(const cache::Step& step, const cache::KvCache& cache);
// Row numbers of each sequence's last token, [sequences] int64.
at::Tensor last_rows(const cache::Step& step);

}  // namespace natslm::models
