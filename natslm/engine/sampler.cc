// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"

namespace natslm::engine {
namespace {

// Uniform in (0, 1), from 53 random bits.
double uniform(uint64_t seed, int64_t position) {
  const uint64_t key = mix64(seed);
  const uint64_t counter = static_cast<uint64_t>(position);
  const auto words =
      philox({static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
             {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0});
  const uint64_t bits = (uint64_t{words[0]} << 21) ^ (words[1] >> 11);
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

// Highest logit; ties and the order of candidates go by id, so that results are reproducible.
int32_t best(std::span<const float> logits) {
  int32_t winner = -1;
  float highest = -std::numeric_limits<float>::infinity();
  for (size_t id = 0; id < logits.size(); ++id) {
    NATSLM_CHECK(!std::isnan(logits[id]), "the model's logits are not numbers (token ", id,
                 "): its weights are damaged or training diverged; take an earlier checkpoint");
    if (logits[id] > highest) {
      highest = logits[id];
      winner = static_cast<int32_t>(id);
    }
  }
  NATSLM_CHECK(
      winner >= 0 && std::isfinite(highest),
      "the model's logits are not finite: its weights are damaged or training diverged; take an "
      "earlier checkpoint");
  return winner;
}

}  // namespace

void check(const Sampling& sampling) {
  NATSLM_CHECK(sampling.temperature >= 0 && std::isfinite(sampling.temperature), "temperature ",
               sampling.temperature, " is not allowed: give 0 (always the best token) or more");
  NATSLM_CHECK(sampling.top_k >= 0, "top-k ", sampling.top_k,
               " is not allowed: give 0 (all tokens) or more");
  NATSLM_CHECK(sampling.top_p > 0 && sampling.top_p <= 1, "top-p ", sampling.top_p,
               " is not allowed: give a share above 0 and up to 1 (all tokens)");
}

int32_t sample(std::span<const float> logits, const Sampling& sampling, int64_t position) {
  const int32_t top = best(logits);
  if (sampling.temperature == 0 || sampling.top_k == 1) return top;

  const double inverse = 1.0 / sampling.temperature;
  std::vector<double> weight(logits.size());
  for (size_t id = 0; id < logits.size(); ++id) {
    weight[id] = std::exp((static_cast<double>(logits[id]) - logits[top]) * inverse);
  }

  std::vector<int32_t> candidates(logits.size());
  std::iota(candidates.begin(), candidates.end(), 0);
  const bool some_only = sampling.top_k > 0 && sampling.top_k < static_cast<int32_t>(logits.size());
  if (some_only || sampling.top_p < 1) {
    const auto better = [&](int32_t a, int32_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    const size_t kept = some_only ? sampling.top_k : candidates.size();
    std::partial_sort(candidates.begin(), candidates.begin() + kept, candidates.end(), better);
    candidates.resize(kept);
  }
  double total = 0;
  for (const int32_t id : candidates) total += weight[id];
  if (sampling.top_p < 1) {
    // The nucleus is cut from what top-k left, with probabilities that sum to one there.
    double reached = 0;
    size_t kept = 0;
    while (kept < candidates.size() && reached < sampling.top_p * total) {
      reached += weight[candidates[kept++]];
    }
    candidates.resize(kept);
    total = reached;
  }

  double left = uniform(sampling.seed, position) * total;
  for (const int32_t id : candidates) {
    left -= weight[id];
    if (left < 0) return id;
  }
  return candidates.back();  // rounding only
}

}  // namespace natslm::engine
