// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/runs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace natslm::eval {
namespace {

// Of the sequences at work, at most; but one is always let in.
struct Limits {
  int64_t step_rows, step_logits, kv_bytes;
};
constexpr Limits kOnCpu = {1024, int64_t{1} << 24, int64_t{4} << 30};
constexpr Limits kOnGpu = {4096, int64_t{1} << 28, int64_t{16} << 30};

int64_t sequences_for(const models::Model& model, const PerplexityOptions& options) {
  const models::Config& c = model.config();
  const Limits& limits = model.device().is_cuda() ? kOnGpu : kOnCpu;
  const int64_t context = options.context > 0 ? options.context : c.context;
  const cache::Shape shape =
      model.cache_shape(options.cache_dtype == at::kBFloat16 ? at::kBFloat16 : at::kFloat);
  const int64_t kv_bytes = context * c.layers * c.kv_heads * shape.key_bytes();
  const int64_t rows = std::min(limits.step_rows, limits.step_logits / std::max(1, c.vocabulary));
  return std::max<int64_t>(1, std::min(rows / std::max(1, options.prefill_chunk),
                                       limits.kv_bytes / std::max<int64_t>(1, kv_bytes)));
}

}  // namespace

engine::Options engine_options(const models::Model& model, const PerplexityOptions& options) {
  engine::Options settings;
  settings.prefill_chunk = options.prefill_chunk;
  settings.cache_dtype = options.cache_dtype;
  settings.max_sequences =
      options.batch > 0 ? options.batch : static_cast<int32_t>(sequences_for(model, options));
  settings.max_step_rows = settings.max_sequences * options.prefill_chunk;
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
