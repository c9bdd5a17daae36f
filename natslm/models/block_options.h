// What the decoders of pretrained families do differently. One decoder (decoder.h) reads these.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "natslm/models/rope.h"

namespace natslm::models {

enum class NormKind : uint8_t { kRms, kLayer };
enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh };

struct BlockOptions {
  NormKind norm = NormKind::kRms;
  bool norm_bias = false;
  bool qkv_bias = false, out_bias = false, mlp_bias = false;
  bool qk_norm = false;     // RMS norm of every query and key head before it is turned
  bool post_norms = false;  // attention's and the feed-forward part's outputs are normed too
  bool gated = true;  // feed-forward: out(activation(gate x) * (up x)); else out(activation(in x))
  Activation activation = Activation::kSilu;
  bool tied = false;              // the output matrix is the embedding
  int32_t learned_positions = 0;  // rows of a table of vectors, one for each position, that are
                                  // added to the embedding; 0: there is none
  double embedding_scale = 1;
  double attention_scale = 0;  // of the scores; 0: 1 / sqrt(head_dim)
  double logit_soft_cap = 0;   // logits become cap * tanh(logits / cap); 0: they stay
  // Rotary embeddings, and which of them each layer has; rope_of empty: the first. None: no layer
  // turns its heads.
  std::vector<RopeOptions> rope;
  std::vector<uint8_t> rope_of;  // [layers] or empty
  // The model's own limit on who may read a key: the query `window - 1` places later is the last.
  // 0: none. Empty: none in any layer.
  std::vector<int32_t> windows;  // [layers] or empty

  bool operator==(const BlockOptions&) const = default;
};

}  // namespace natslm::models
