// The loss of a language model and its gradient in one pass over the logits, which are the largest
// tensor of a training step: the gradient takes their place in memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace natslm::train {

// logits [..., V] (any floating type, contiguous); targets int64 with as many elements as logits
// has rows, each in [0, V). Returns the sum of -log softmax(logits)[target] over the rows, added up
// in double, and overwrites logits with `weight` times that sum's derivative. The arithmetic is in
// float. Throws Error for a target outside the vocabulary. (If autograd had kept the logits for a
// backward pass, that pass throws: they are marked as changed.)
double cross_entropy_to_gradient(const at::Tensor& logits, const at::Tensor& targets,
                                 double weight);

// The sum alone; logits stay as they are.
double cross_entropy(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace natslm::train
