// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/lifetimes.h"

#include <algorithm>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"

namespace natslm::roles {
namespace {

void fill(std::span<int32_t> row, int32_t begin, int32_t end, int32_t value) {
  if (!row.empty()) std::fill(row.begin() + begin, row.begin() + end, value);
}

}  // namespace

void write_lifetimes(std::span<const int8_t> roles, int32_t length, const Options& options,
                     const LifetimeRows& out) {
  const int32_t c = options.chunk;
  const int32_t chunks = length / c;
  NATSLM_ASSERT(static_cast<int32_t>(roles.size()) == chunks);
  fill(out.last, chunks * c, length, kForever);
  for (const auto& horizon : out.horizon) fill(horizon, chunks * c, length, kForever);
  int32_t next_global = kForever;  // last token of the next Global chunk
  for (int32_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int32_t begin = chunk * c, end = begin + c;
    const int32_t horizon[kRoles] = {kForever, next_global, window_end(end - 1, options.window)};
    const int8_t role = chunk == 0 ? int8_t{kGlobal} : roles[chunk];
    fill(out.last, begin, end, horizon[role]);
    for (int t = 0; t < kRoles; ++t) fill(out.horizon[t], begin, end, horizon[t]);
    if (role == kGlobal) next_global = end - 1;
  }
}

void write_key_order(std::span<const int32_t> last, int32_t reach, std::span<int32_t> order,
                     std::span<int32_t> ends) {
  const auto length = static_cast<int32_t>(last.size());
  int32_t place = 0;
  for (int segment = 0; segment < kernels::KeyOrder::kSegments; ++segment) {
    for (int32_t j = 0; j < length; ++j) {
      if (key_segment(j, last[j], reach) == segment) order[place++] = j;
    }
    ends[segment] = place;
  }
}

KeyShares key_shares(std::span<const int32_t> last, std::span<const double> harmonic) {
  const int32_t tokens = static_cast<int32_t>(last.size());
  if (tokens == 0) return {};
  int64_t pairs = 0, end = 0;
  double mean = 0;
  for (int32_t j = 0; j < tokens; ++j) {
    const int64_t served = queries_served(j, last[j], tokens);
    pairs += served;
    end += last[j] >= tokens - 1;
    // Query i holds a share of 1 / (i + 1) in each key it reads.
    mean += harmonic[j + served] - harmonic[j];
  }
  const double n = tokens;
  return {static_cast<double>(pairs) / (n * (n + 1) / 2), static_cast<double>(end) / n, mean / n};
}

void write_harmonic(std::span<double> harmonic) {
  double sum = 0;
  for (size_t n = 0; n < harmonic.size(); ++n) {
    if (n > 0) sum += 1.0 / static_cast<double>(n);
    harmonic[n] = sum;
  }
}

}  // namespace natslm::roles
