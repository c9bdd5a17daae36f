// SPDX-License-Identifier: Apache-2.0
#include "tests/support/decode_case.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "natslm/kernels/element.h"
#include "tests/support/attention_case.h"

namespace natslm::test {

using kernels::AttentionDecode;
using kernels::CachedKeys;
using kernels::kPageKeys;

namespace {

std::vector<uint8_t> poisoned(int64_t elements, DType dtype) {
  std::vector<uint8_t> bytes(elements * size_of(dtype) + 64);
  for (int64_t i = 0; i < elements; ++i) kernels::store(bytes.data(), dtype, i, kNaN);
  return bytes;
}

// The page proper inside its memory, 64-byte aligned.
void* aligned(std::vector<uint8_t>& bytes) {
  return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
}

}  // namespace

DecodeProblem::DecodeProblem(const DecodeCase& c) {
  std::mt19937_64 random(c.seed);
  std::normal_distribution<double> normal;
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  const int d = c.head_dim, batch = static_cast<int>(c.rows.size());
  for (int b = 0; b < batch; ++b) {
    const int first = c.counts[b] + below(5);  // position of the first query
    for (int i = 0; i < c.rows[b]; ++i) row_position.push_back(first + i);
    row_start.push_back(row_start.back() + c.rows[b]);
    for (int h = 0; h < c.kv_heads; ++h) {
      const int count = std::max(0, c.counts[b] - (h > 0 ? below(3) : 0));
      const int tokens = first + c.rows[b];
      std::vector<int32_t> positions(std::max(tokens, count));
      for (size_t j = 0; j < positions.size(); ++j) positions[j] = static_cast<int32_t>(j);
      std::shuffle(positions.begin(), positions.end(), random);
      positions.resize(count);
      std::vector<int32_t> lasts;
      for (int32_t& position_of_key : positions) {
        if (c.live == Live::kFuture) position_of_key += tokens;
        const int32_t some[] = {kForever, kOpenEnded, first + below(c.rows[b] + 2), first - 1};
        lasts.push_back(c.live == Live::kAll      ? kForever
                        : c.live == Live::kNever  ? first - 1 - below(9)
                        : c.live == Live::kFuture ? kForever
                                                  : some[below(4)]);
        if (c.live == Live::kAll) position_of_key = std::min(position_of_key, first);
      }
      std::vector<const void*> table;
      for (int j = 0; j < count; ++j) {
        if (j % kPageKeys == 0) {
          pages.push_back(poisoned(int64_t{2} * kPageKeys * d + 64, c.dtype));
          table.push_back(aligned(pages.back()));
        }
        bool read = false;
        for (int i = first; i < tokens; ++i) read = read || visible(i, positions[j], lasts[j]);
        void* page = aligned(pages.back());
        for (int ch = 0; ch < d; ++ch) {
          kernels::store(page, c.dtype, int64_t{ch} * kPageKeys + j % kPageKeys,
                         read ? normal(random) : kNaN);
          kernels::store(page, c.dtype, int64_t{kPageKeys + j % kPageKeys} * d + ch,
                         read ? normal(random) : kNaN);
        }
      }
      position.push_back(positions);
      last.push_back(lasts);
      tables.push_back(table);
      mass.emplace_back(count, kNaN);
    }
  }
  for (size_t list = 0; list < tables.size(); ++list) {
    keys.push_back({tables[list].data(), position[list].data(), last[list].data(),
                    mass[list].data(), static_cast<int32_t>(position[list].size())});
  }
  const int rows = row_start.back();
  const int64_t elements = int64_t{rows} * c.q_heads * d;
  q = out = poisoned(elements, c.dtype);
  for (int64_t i = 0; i < elements; ++i) kernels::store(q.data(), c.dtype, i, normal(random));
  lse.assign(int64_t{rows} * c.q_heads, kNaN);
  params.batch = batch;
  params.q_heads = c.q_heads;
  params.kv_heads = c.kv_heads;
  params.head_dim = d;
  params.rows = rows;
  params.scale = static_cast<float>(1.5 / std::sqrt(d));
  params.dtype = c.dtype;
  params.row_start = row_start.data();
  params.row_position = row_position.data();
  params.q = q.data();
  params.keys = keys.data();
  params.out = out.data();
  params.lse = lse.data();
}

DecodeResult result_of(const DecodeProblem& problem, const DecodeCase& c) {
  DecodeResult result;
  const int64_t elements = int64_t{problem.params.rows} * c.q_heads * c.head_dim;
  for (int64_t i = 0; i < elements; ++i) {
    result.out.push_back(kernels::load(problem.out.data(), c.dtype, i));
  }
  result.lse = widen(problem.lse);
  for (const auto& mass : problem.mass) {
    for (const float m : mass) result.mass.push_back(m);
  }
  return result;
}

DecodeResult run_decode(const DecodeCase& c, DecodeKernel kernel, const ParallelFor& parallel) {
  DecodeProblem problem(c);
  problem.params.parallel = parallel;
  kernel(problem.params);
  return result_of(problem, c);
}

namespace {

void plain_decode(const AttentionDecode& p, bool matrix_units) {
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
  // What matrix units are used with: powers of two, whose exponents are scores times log2(e).
  const auto power = [&](float x) { return matrix_units ? std::exp2(x) : std::exp(x); };
  const int d = p.head_dim, group = p.q_heads / p.kv_heads;
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.kv_heads; ++h) {
      const CachedKeys& keys = p.keys[b * p.kv_heads + h];
      std::fill_n(keys.mass, keys.count, 0.0f);
      for (int row = p.row_start[b]; row < p.row_start[b + 1]; ++row) {
        for (int head = h * group; head < (h + 1) * group; ++head) {
          const int64_t at = int64_t{row} * p.q_heads + head;
          std::vector<float> score(keys.count), out(d, 0);
          float total = 0, highest = -std::numeric_limits<float>::infinity();
          for (const bool scores : {true, false}) {
            for (int j = 0; j < keys.count; ++j) {
              if (!visible(p.row_position[row], keys.position[j], keys.last[j])) continue;
              const void* page = keys.pages[j / kPageKeys];
              const int in_page = j % kPageKeys;
              if (scores) {
                float sum = 0;
                for (int i = 0; i < d; ++i) {
                  const int c = matrix_units ? d - 1 - i : i;
                  sum += static_cast<float>(
                      kernels::load(p.q, p.dtype, at * d + c) *
                      kernels::load(page, p.dtype, int64_t{c} * kPageKeys + in_page));
                }
                score[j] = (matrix_units ? p.scale * kLog2e : p.scale) * sum;
                highest = std::max(highest, score[j]);
                continue;
              }
              const float weight = power(score[j] - highest);
              total += weight;
              const float factor = matrix_units && p.dtype == DType::kBFloat16
                                       ? static_cast<float>(BFloat16(weight))
                                       : weight;
              for (int c = 0; c < d; ++c) {
                out[c] += factor * static_cast<float>(kernels::load(
                                       page, p.dtype, int64_t{kPageKeys + in_page} * d + c));
              }
            }
          }
          for (int c = 0; c < d; ++c) {
            kernels::store(p.out, p.dtype, at * d + c, total > 0 ? out[c] / total : 0);
          }
          p.lse[at] =
              matrix_units ? (highest + std::log2(total)) * kLn2 : highest + std::log(total);
          for (int j = 0; j < keys.count; ++j) {
            if (!visible(p.row_position[row], keys.position[j], keys.last[j])) continue;
            // The plain second pass knows the log-sum-exp.
            const float lse = matrix_units ? p.lse[at] * kLog2e : p.lse[at];
            keys.mass[j] += power(score[j] - lse);
          }
        }
      }
    }
  }
}

}  // namespace

void plain_decode(const AttentionDecode& p) {
  plain_decode(p, false);
}
void plain_decode_of_matrix_units(const AttentionDecode& p) {
  plain_decode(p, true);
}

void append(DecodeResult& all, const DecodeResult& one) {
  all.out.insert(all.out.end(), one.out.begin(), one.out.end());
  all.lse.insert(all.lse.end(), one.lse.begin(), one.lse.end());
  all.mass.insert(all.mass.end(), one.mass.begin(), one.mass.end());
}

std::vector<DecodeCase> decode_corners() {
  return {
      {"one key, one query", 1, 1, 1, 8, {1}, {1}, Live::kAll},
      {"no key at all", 2, 2, 1, 8, {2}, {0}, Live::kAll},
      {"a sequence without queries beside one with", 3, 2, 2, 16, {0, 3, 0}, {10, 20, 0}},
      {"a page but for one key", 4, 1, 1, 64, {1}, {63}, Live::kAll},
      {"exactly a page", 5, 1, 1, 64, {1}, {64}, Live::kAll},
      {"a page and one key", 6, 1, 1, 64, {1}, {65}, Live::kAll},
      {"keys that are all dead", 7, 2, 1, 16, {3}, {100}, Live::kNever},
      {"keys that are all in the future", 8, 2, 1, 16, {3}, {100}, Live::kFuture},
      {"a list that is cut into pieces", 9, 3, 1, 64, {1}, {2500}, Live::kMixed},
      {"a piece and one key", 10, 1, 1, 8, {1}, {1025}, Live::kAll},
      {"pieces without a visible key", 11, 1, 1, 8, {2}, {1100}, Live::kNever},
      {"five heads of a group", 12, 5, 1, 24, {1}, {130}},
      {"seven heads of a group", 13, 7, 1, 40, {1}, {130}},
      {"more rows than a task holds", 14, 4, 2, 32, {29}, {300}},
      {"the largest head", 15, 2, 1, 256, {3}, {200}},
      {"nine sequences of one token",
       16,
       6,
       2,
       64,
       {1, 1, 1, 1, 1, 1, 1, 1, 1},
       {1, 2, 63, 64, 65, 128, 129, 700, 1500}},
  };
}

std::string compare_decode(const DecodeResult& fast, const DecodeResult& plain,
                           const DecodeResult& again, const DecodeResult& truth,
                           const DecodeCase& c) {
  AttentionCase label;
  label.name = c.name;
  label.seed = c.seed;
  label.q_heads = c.q_heads;
  label.kv_heads = c.kv_heads;
  label.head_dim = c.head_dim;
  label.batch = static_cast<int>(c.rows.size());
  label.tokens = c.counts[0];
  return compare("out", fast.out, plain.out, again.out, truth.out, c.dtype, label) +
         compare("lse", fast.lse, plain.lse, again.lse, truth.lse, DType::kFloat32, label) +
         compare("mass", fast.mass, plain.mass, again.mass, truth.mass, DType::kFloat32, label);
}

}  // namespace natslm::test
