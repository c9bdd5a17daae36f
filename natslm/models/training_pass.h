// A training pass whose gradients are written out instead of recorded: matrix products in the type
// of the copies of the weights (bfloat16 on a GPU), the residual stream, all sums and the gradients
// of the weights in float32, no logits of all tokens at a time, nothing that waits for the device.
// The sequence of kernels depends on shapes and options alone, so that a CUDA graph can repeat it.
//
// With float32 copies on the CPU it computes what Model::forward and autograd compute.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string_view>

#include "natslm/models/model.h"

namespace natslm::models {

// What the gradients of a pass are of, and where they go.
struct PassGradients {
  double loss_weight = 1;   // of the sum of -log p over the tokens
  at::Tensor price_weight;  // of the price, 0-dim float on the device; undefined: the price is free
  bool weights = true;      // of all weights but the score layers
  bool scores = true;       // of the score layers
  bool accumulate = false;  // add to the gradients that are wanted instead of overwriting them
};

struct PassOutput {
  at::Tensor loss;    // 0-dim double: sum of -log p over the tokens, nats
  at::Tensor shares;  // [roles::kShares] double, means over sequences, layers and KV heads;
                      // undefined if dense
};

class TrainingPass {
 public:
  virtual ~TrainingPass() = default;

  // Takes over the model's weights as they are now. Must be called after each change of them.
  virtual void load_weights() = 0;

  // input.tokens and targets are [B, T] int32 on the model's device, T within the context; the
  // caller has made sure that all are inside the vocabulary.
  virtual PassOutput loss(const TrainingInput& input, const at::Tensor& targets) = 0;
  // Also writes the gradients.
  virtual PassOutput loss_and_gradients(const TrainingInput& input, const at::Tensor& targets,
                                        const PassGradients& gradients) = 0;

  // One for each of the model's parameters, in their order and with their shapes, float32. Owned by
  // the pass, made when they are first asked for or written; 0 until written.
  virtual const std::vector<at::Tensor>& gradients() = 0;

  // Told the name of each part of the pass before its first kernel is queued; for measurements.
  using Marker = std::function<void(std::string_view part)>;
  void set_marker(Marker marker) { marker_ = std::move(marker); }

 protected:
  void mark(std::string_view part) const {
    if (marker_) marker_(part);
  }

 private:
  Marker marker_;
};

}  // namespace natslm::models
