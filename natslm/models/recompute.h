// Activation checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost"): of
// a layer only its input is kept, the rest is made again when the backward pass comes to it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "natslm/models/blocks.h"

namespace natslm::models {

// A layer as a function of its input alone: called again with the same input it must do the same.
using LayerFunction = std::function<at::Tensor(const at::Tensor& x, RoleTally& tally)>;

// layer(x, tally), differentiable in x and in the price that it adds to the tally; gradients of
// leaves that the layer reads (score layers) are added to them when the backward pass gets here. It
// must be the whole graph's only way to them.
at::Tensor recomputed(const at::Tensor& x, RoleTally& tally, LayerFunction layer);

}  // namespace natslm::models
