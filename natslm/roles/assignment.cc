// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/assignment.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "natslm/roles/gumbel.h"
#include "natslm/roles/lifetimes.h"
#include "natslm/roles/role_choice.h"

namespace natslm::roles {
namespace {

int32_t length_of(const int32_t* lengths, int32_t b, int32_t tokens) {
  return lengths ? lengths[b] : tokens;
}

// Roles of the chunks of one (sequence, head): those used, and the argmax ones at bias 0.
void choose_roles(const Assignment& p, NoiseKey key, int32_t b, int32_t head, int32_t chunks,
                  std::vector<int8_t>& used, std::vector<int8_t>& plain) {
  const int32_t c = p.options.chunk;
  const float bias = p.bias ? p.bias[b] : 0.0f;
  const int64_t sequence = p.sequences ? p.sequences[b] : b;
  const int64_t row = int64_t{b} * p.kv_heads + head;
  float* soft = p.sample && p.soft ? p.soft + row * (p.tokens / c) * kRoles : nullptr;
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    const Triple logits = chunk_logits(
        p.logits, p.logits_dtype,
        b * p.logits_batch_stride + int64_t{chunk} * c * p.logits_token_stride + kRoles * head,
        p.logits_token_stride, c);
    const RoleChoice choice =
        p.sample ? sample_role(logits, p.options.set, bias,
                               gumbel_noise(key, p.first_head + head, sequence, chunk * c))
                 : choose_role(logits, p.options.set, bias);
    used[chunk] = choice.used;
    plain[chunk] = choice.plain;
    if (!soft) continue;
    const Triple probabilities = chunk == 0 ? Triple{} : softmax(choice.scores, p.options.set);
    std::copy(probabilities.begin(), probabilities.end(), soft + int64_t{chunk} * kRoles);
  }
  if (soft) std::fill(soft + chunks * kRoles, soft + p.tokens / c * kRoles, 0.0f);
  if (chunks > 0) used[0] = plain[0] = kGlobal;
}

// Keys readable by the last query / all keys.
double kv_end(const std::vector<int8_t>& roles, int32_t chunks, int32_t length,
              const Options& options) {
  const int32_t c = options.chunk, newest = length - 1;
  int32_t alive = length - chunks * c;
  int32_t next_global = kForever;
  for (int32_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int32_t end = chunk * c + c - 1;
    const Role role{roles[chunk]};
    const bool lives =
        role == kGlobal ||
        (role == kLocal ? next_global >= newest : int64_t{end} + options.window >= newest);
    if (lives) alive += c;
    if (role == kGlobal) next_global = end;
  }
  return static_cast<double>(alive) / length;
}

void write_onehot(float* onehot, const std::vector<int8_t>& roles, int32_t chunks, int32_t c,
                  int32_t length, int32_t tokens) {
  std::fill(onehot, onehot + int64_t{tokens} * kRoles, 0.0f);
  for (int32_t t = 0; t < length; ++t) {
    const int32_t chunk = t / c;
    onehot[t * kRoles + (chunk < chunks ? roles[chunk] : int8_t{kGlobal})] = 1.0f;
  }
}

}  // namespace

void assign(const Assignment& p) {
  const int32_t c = p.options.chunk;
  const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;
  const NoiseKey key = noise_key(p.seed, p.step, p.layer);
  std::vector<double> harmonic(p.tokens + 1);
  write_harmonic(harmonic);

  p.parallel(int64_t{p.batch} * p.kv_heads, [&](int64_t row, int) {
    const auto b = static_cast<int32_t>(row / p.kv_heads);
    const auto head = static_cast<int32_t>(row % p.kv_heads);
    const int32_t length = length_of(p.lengths, b, p.tokens), chunks = length / c;
    std::vector<int8_t> used(chunks), plain(chunks);
    choose_roles(p, key, b, head, chunks, used, plain);

    const int64_t first = row * p.tokens;
    LifetimeRows rows{.last = {p.last + first, static_cast<size_t>(length)}};
    for (int t = 0; t < kRoles; ++t) {
      rows.horizon[t] = {p.horizons + t * plane + first, static_cast<size_t>(length)};
      std::fill(p.horizons + t * plane + first + length, p.horizons + t * plane + first + p.tokens,
                -1);
    }
    std::fill(p.last + first + length, p.last + first + p.tokens, -1);
    write_lifetimes(used, length, p.options, rows);
    if (p.ends) {
      constexpr int kSegments = kernels::KeyOrder::kSegments;
      write_key_order(rows.last, key_reach(p.options),
                      {p.order + first, static_cast<size_t>(length)},
                      {p.ends + row * kSegments, kSegments});
    }

    for (int32_t t = 0; t < p.tokens; ++t) {
      p.roles[first + t] = t < chunks * c ? used[t / c] : int8_t{kGlobal};
    }
    write_onehot(p.onehot + first * kRoles, used, chunks, c, length, p.tokens);
    const KeyShares shares = key_shares(rows.last, harmonic);
    float* out = p.shares + row * kShares;
    out[kPairs] = static_cast<float>(shares.pairs);
    out[kKvEnd] = static_cast<float>(shares.kv_end);
    out[kKvMean] = static_cast<float>(shares.kv_mean);
    out[kArgmaxKvEnd] =
        length == 0 ? 1.0f : static_cast<float>(kv_end(plain, chunks, length, p.options));
  });
}

void assign_backward(const AssignmentGradient& p) {
  const int32_t c = p.chunk, width = kRoles * p.kv_heads;
  const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;
  // A task is a run of whole chunks of one sequence: whole rows of dlogits.
  const int32_t block = std::max(1, 256 / c) * c;
  const int32_t blocks = (p.tokens + block - 1) / block;

  p.parallel(int64_t{p.batch} * blocks, [&](int64_t task, int) {
    const auto b = static_cast<int32_t>(task / blocks);
    const auto begin = static_cast<int32_t>(task % blocks) * block;
    const int32_t end = std::min(begin + block, p.tokens);
    const int32_t length = length_of(p.lengths, b, p.tokens), with_role = length / c * c;
    float* out = p.dlogits + (int64_t{b} * p.tokens + begin) * width;
    std::fill(out, out + int64_t{end - begin} * width, 0.0f);
    // Of sum_j cost(j) / (T (T + 1) / 2), mean over B and Hkv.
    const double per_pair =
        p.dprice * 2.0 / (double(length) * (double(length) + 1.0)) / (double(p.batch) * p.kv_heads);

    for (int32_t head = 0; head < p.kv_heads; ++head) {
      const int64_t row = int64_t{b} * p.kv_heads + head;
      const float* soft = p.soft + row * (p.tokens / c) * kRoles;
      for (int32_t j = begin; j < std::min(end, with_role); j += c) {
        double u[kRoles] = {};
        for (int role = 0; role < kRoles; ++role) {
          const int32_t* horizon = p.horizons + role * plane + row * p.tokens;
          for (int32_t t = j; t < j + c; ++t) {
            if (p.donehot) {
              u[role] += p.donehot[b * p.batch_stride + head * p.head_stride + t * p.token_stride +
                                   role * p.role_stride];
            }
            u[role] += per_pair * static_cast<double>(queries_served(t, horizon[t], length));
          }
        }
        const float* y = soft + int64_t{j / c} * kRoles;
        const double mean = y[0] * u[0] + y[1] * u[1] + y[2] * u[2];
        for (int role = 0; role < kRoles; ++role) {
          const auto d = static_cast<float>(y[role] * (u[role] - mean) / c);
          for (int32_t t = j; t < j + c; ++t)
            out[int64_t{t - begin} * width + kRoles * head + role] = d;
        }
      }
    }
  });
}

}  // namespace natslm::roles
