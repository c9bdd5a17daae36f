// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/runs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace natslm::eval {
namespace {

constexpr int64_t kStepRows = 1024;
constexpr int64_t kStepLogits = int64_t{1} << 24;

}  // namespace

engine::Options engine_options(const models::Config& config, int32_t prefill_chunk, int32_t batch,
                               at::ScalarType cache_dtype) {
  engine::Options settings;
  settings.prefill_chunk = prefill_chunk;
  settings.cache_dtype = cache_dtype;
  const int64_t rows = std::max<int64_t>(
      prefill_chunk, std::min(kStepRows, kStepLogits / std::max(1, config.vocabulary)));
  settings.max_sequences =
      batch > 0 ? batch
                : static_cast<int32_t>(std::max<int64_t>(1, rows / std::max(1, prefill_chunk)));
  settings.max_step_rows = settings.max_sequences * prefill_chunk;
  return settings;
}

KeyMeans means_of(std::span<const engine::KeyUse> uses, int64_t full_length) {
  KeyMeans means;
  double full_end = 0;
  int64_t full = 0;
  for (const engine::KeyUse& use : uses) {
    const auto weight = static_cast<double>(use.tokens);
    means.kv_end += use.kv_end;
    means.kv_mean += use.kv_mean * weight;
    means.kv_bytes_mean += use.kv_bytes_mean * weight;
    means.kv_bytes_peak = std::max(means.kv_bytes_peak, use.kv_bytes_peak);
    means.demoted += use.demoted;
    means.kv_peak_over_cap = std::max(means.kv_peak_over_cap, use.kv_peak_over_cap);
    means.tokens += use.tokens;
    if (use.tokens == full_length) {
      full_end += use.kv_end;
      ++full;
    }
  }
  means.kv_end /= static_cast<double>(uses.size());
  means.kv_end_full = full > 0 ? full_end / static_cast<double>(full) : means.kv_end;
  means.kv_mean /= static_cast<double>(means.tokens);
  means.kv_bytes_mean /= static_cast<double>(means.tokens);
  return means;
}

double standard_error(std::span<const double> sums, std::span<const double> counts) {
  const auto groups = static_cast<double>(sums.size());
  if (groups < 2) return 0;
  const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
  const double ratio = std::accumulate(sums.begin(), sums.end(), 0.0) / total;
  double squares = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const double off = sums[i] - ratio * counts[i];
    squares += off * off;
  }
  return std::sqrt(squares * groups / (groups - 1)) / total;
}

}  // namespace natslm::eval
