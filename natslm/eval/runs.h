// What evaluations share: how the engine is set up for many texts, and means over what they did.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "natslm/engine/engine.h"
#include "natslm/eval/perplexity.h"
#include "natslm/models/model.h"

namespace natslm::eval {

// How the engine runs windows of options.context tokens. Without options.batch: enough sequences at
// a time for good matrix products, few enough that a step's logits (64 MiB; on a GPU, where a step
// of few rows waits for its host, 1 GiB) and all keys and values, should none die (4 GiB; 16), stay
// small.
engine::Options engine_options(const models::Model& model, const PerplexityOptions& options);

// Means over sequences of what they kept; the shares' meaning is that of engine::KeyUse.
struct KeyMeans {
  double kv_end = 0;         // mean over sequences
  double kv_end_full = 0;    // over those of `full_length` tokens only; all if there is none
  double kv_mean = 0;        // mean over all tokens
  double kv_bytes_mean = 0;  // held by one sequence, mean over all tokens
  int64_t kv_bytes_peak = 0;
  int64_t demoted = 0;          // keys given up to keep a guaranteed budget, over all sequences
  double kv_peak_over_cap = 0;  // readable keys / those allowed, highest over all tokens
  int64_t tokens = 0;           // that went through the model
};
KeyMeans means_of(std::span<const engine::KeyUse> uses, int64_t full_length = 0);

// Standard error of sum(sums) / sum(counts) when groups (windows, texts) of `counts` scores each
// were drawn independently and scores inside a group are not independent: the linearised ratio
// estimator of cluster sampling (Cochran, "Sampling Techniques", 1977, section 6.3). 0 for one
// group.
double standard_error(std::span<const double> sums, std::span<const double> counts);

}  // namespace natslm::eval
