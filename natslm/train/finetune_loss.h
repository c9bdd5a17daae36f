// Losses of a frozen model's texts with their gradient at the last hidden states. Logits exist for
// some rows at a time, and rows that count nothing have none.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "natslm/models/model.h"

namespace natslm::train {

struct RowsLoss {
  at::Tensor loss;      // 0-dim double on the device: sum of weight * loss over the rows
  at::Tensor gradient;  // of `loss` at `hidden`, of its shape, float
};

// `kind`: a value of FinetuneOptions::loss. hidden [B, T, width]; teacher [B, T, width] that of the
// dense model, undefined for "ce"; targets [B, T] int64; weights [B, T] float. All on one device;
// of `hidden` only the values are read. Nothing waits for the device but the search for rows whose
// weight is not 0.
RowsLoss rows_loss(const models::Model& model, const std::string& kind, const at::Tensor& hidden,
                   const at::Tensor& teacher, const at::Tensor& targets, const at::Tensor& weights);

}  // namespace natslm::train
