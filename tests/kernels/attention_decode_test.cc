// Attention over cached pages: the fast kernel against the definition in double precision.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_decode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"
#include "tests/support/attention_case.h"

namespace natslm::test {
namespace {

using kernels::AttentionDecode;
using kernels::CachedKeys;
using kernels::kPageKeys;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// How the stored keys stand to the queries.
enum class Live { kAll, kMixed, kFuture, kNever };

struct DecodeCase {
  std::string name;
  uint64_t seed = 1;
  int q_heads = 1, kv_heads = 1, head_dim = 8;
  std::vector<int> rows = {1};     // of each sequence
  std::vector<int> counts = {64};  // stored keys of each sequence (the heads differ a little)
  Live live = Live::kMixed;
  DType dtype = DType::kFloat32;
};

// Memory of one problem. What must not be read is NaN: page slack, keys that no query of their
// sequence sees. What must be written starts as NaN.
struct Problem {
  explicit Problem(const DecodeCase& c);
  AttentionDecode params;
  std::vector<std::vector<uint8_t>> pages;
  std::vector<std::vector<const void*>> tables;
  std::vector<std::vector<int32_t>> position, last;
  std::vector<std::vector<float>> mass;
  std::vector<CachedKeys> keys;
  std::vector<int32_t> row_start{0}, row_position;
  std::vector<uint8_t> q, out;
  std::vector<float> lse;
};

std::vector<uint8_t> poisoned(int64_t elements, DType dtype) {
  std::vector<uint8_t> bytes(elements * size_of(dtype) + 64);
  for (int64_t i = 0; i < elements; ++i) kernels::store(bytes.data(), dtype, i, kNaN);
  return bytes;
}

// The page proper inside its memory, 64-byte aligned.
void* aligned(std::vector<uint8_t>& bytes) {
  return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
}

Problem::Problem(const DecodeCase& c) {
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

struct Result {
  std::vector<double> out, lse, mass;
};

using Kernel = void (*)(const AttentionDecode&);

Result run(const DecodeCase& c, Kernel kernel, const ParallelFor& parallel = serial()) {
  Problem problem(c);
  problem.params.parallel = parallel;
  kernel(problem.params);
  Result result;
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

// The obvious loops in float, rounding where the type rounds: the yardstick of the tolerance.
void plain_decode(const AttentionDecode& p) {
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
                for (int c = 0; c < d; ++c) {
                  sum += static_cast<float>(
                      kernels::load(p.q, p.dtype, at * d + c) *
                      kernels::load(page, p.dtype, int64_t{c} * kPageKeys + in_page));
                }
                score[j] = p.scale * sum;
                highest = std::max(highest, score[j]);
                continue;
              }
              const float weight = std::exp(score[j] - highest);
              total += weight;
              for (int c = 0; c < d; ++c) {
                out[c] += weight * static_cast<float>(kernels::load(
                                       page, p.dtype, int64_t{kPageKeys + in_page} * d + c));
              }
            }
          }
          for (int c = 0; c < d; ++c) {
            kernels::store(p.out, p.dtype, at * d + c, total > 0 ? out[c] / total : 0);
          }
          p.lse[at] = highest + std::log(total);
          for (int j = 0; j < keys.count; ++j) {
            if (!visible(p.row_position[row], keys.position[j], keys.last[j])) continue;
            // The plain second pass knows the log-sum-exp.
            keys.mass[j] += std::exp(score[j] - p.lse[at]);
          }
        }
      }
    }
  }
}

void append(Result& all, const Result& one) {
  all.out.insert(all.out.end(), one.out.begin(), one.out.end());
  all.lse.insert(all.lse.end(), one.lse.begin(), one.lse.end());
  all.mass.insert(all.mass.end(), one.mass.begin(), one.mass.end());
}

// Judged together, so that "twice the plain one's worst error" is not one lucky draw of a small
// problem. All of one type.
void expect_right(const std::vector<DecodeCase>& cases) {
  Result truth, plain, fast;
  for (const DecodeCase& c : cases) {
    append(truth, run(c, kernels::reference::run));
    append(plain, run(c, plain_decode));
    append(fast, run(c, kernels::cpu::run, plain_threads(3)));
  }
  const DecodeCase& c = cases.front();
  AttentionCase label;
  label.name = c.name;
  label.seed = c.seed;
  label.q_heads = c.q_heads;
  label.kv_heads = c.kv_heads;
  label.head_dim = c.head_dim;
  label.batch = static_cast<int>(c.rows.size());
  label.tokens = c.counts[0];
  EXPECT_EQ(compare("out", fast.out, plain.out, truth.out, c.dtype, label), "");
  EXPECT_EQ(compare("lse", fast.lse, plain.lse, truth.lse, DType::kFloat32, label), "");
  EXPECT_EQ(compare("mass", fast.mass, plain.mass, truth.mass, DType::kFloat32, label), "");
}

std::vector<DecodeCase> corners() {
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

TEST(AttentionDecode, IsRightInEveryNamedCornerInBothTypes) {
  for (DecodeCase c : corners()) {
    expect_right({c});
    c.dtype = DType::kBFloat16;
    expect_right({c});
  }
}

DecodeCase random_decode_case(uint64_t seed, DType dtype) {
  std::mt19937_64 random(seed);
  const auto in = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  DecodeCase c{"random, and the nine seeds after it", seed};
  c.kv_heads = in(1, 3);
  c.q_heads = c.kv_heads * in(1, 4);
  c.head_dim = 8 * in(1, seed % 8 == 0 ? 32 : 16);
  const int batch = in(1, 3);
  c.rows.clear();
  c.counts.clear();
  for (int b = 0; b < batch; ++b) {
    c.rows.push_back(in(0, 3) == 0 ? in(0, 70) : 1);
    c.counts.push_back(in(0, 3) == 0 ? in(0, 1400) : in(0, 200));
  }
  c.live = in(0, 3) == 0 ? Live::kAll : Live::kMixed;
  c.dtype = dtype;
  return c;
}

TEST(AttentionDecode, IsAtMostTwiceAsWrongAsThePlainOneOnRandomProblems) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (uint64_t first = 100; first < 130; first += 10) {
      std::vector<DecodeCase> cases;
      for (uint64_t seed = first; seed < first + 10; ++seed) {
        cases.push_back(random_decode_case(seed, dtype));
      }
      expect_right(cases);
    }
  }
}

TEST(AttentionDecode, DoesNotDependOnTheWorkers) {
  const DecodeCase c{"workers", 7, 6, 2, 64, {1, 40, 3}, {3000, 500, 1}};
  const Result one = run(c, kernels::cpu::run);
  for (const int threads : {2, 3, 8}) {
    const Result many = run(c, kernels::cpu::run, plain_threads(threads));
    EXPECT_EQ(one.out, many.out);
    EXPECT_EQ(one.lse, many.lse);
    EXPECT_EQ(one.mass, many.mass);
  }
}

TEST(AttentionDecode, OfASequenceDoesNotDependOnItsNeighbours) {
  Problem together({"together", 9, 4, 2, 32, {1, 5}, {1500, 90}});
  kernels::cpu::run(together.params);
  const int64_t first = int64_t{4} * 32;  // elements of the first sequence's one row
  std::vector<float> all(first + 5 * first);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i] = static_cast<float>(kernels::load(together.out.data(), DType::kFloat32, i));
  }
  // The second sequence alone, over the same memory.
  AttentionDecode alone = together.params;
  const std::vector<int32_t> row_start{0, 5};
  std::vector<float> out(5 * first, kNaN);
  alone.batch = 1;
  alone.rows = 5;
  alone.row_start = row_start.data();
  alone.row_position = together.row_position.data() + 1;
  alone.q = static_cast<const float*>(alone.q) + first;
  alone.keys += 2;
  alone.out = out.data();
  alone.lse = nullptr;
  kernels::cpu::run(alone);
  EXPECT_EQ(out, std::vector<float>(all.begin() + first, all.end()));
}

TEST(AttentionDecode, KeepsInfinitiesAndNaNOfVisibleKeysAndIgnoresThoseOfHiddenOnes) {
  for (const float bad : {kNaN, std::numeric_limits<float>::infinity()}) {
    for (const bool in_key : {true, false}) {
      DecodeCase c{"poison", 21, 2, 1, 16, {12}, {90}, Live::kAll};
      Problem truth(c), fast(c);
      for (Problem* problem : {&truth, &fast}) {
        // Readable by the first four of the twelve queries.
        problem->last[0][70] = problem->row_position[3];
        const int64_t at = in_key ? int64_t{3} * kPageKeys + 6 : int64_t{kPageKeys + 6} * 16 + 3;
        kernels::store(const_cast<void*>(problem->tables[0][1]), c.dtype, at, bad);
      }
      kernels::reference::run(truth.params);
      kernels::cpu::run(fast.params);
      for (int64_t i = 0; i < int64_t{12} * 2 * 16; ++i) {
        const double a = kernels::load(truth.out.data(), c.dtype, i);
        const double b = kernels::load(fast.out.data(), c.dtype, i);
        EXPECT_EQ(std::isnan(a), std::isnan(b)) << "element " << i;
        EXPECT_EQ(std::isinf(a), std::isinf(b)) << "element " << i;
        if (std::isfinite(a)) {
          EXPECT_NEAR(a, b, 1e-5) << "element " << i;
        }
      }
    }
  }
}

TEST(AttentionDecode, SaysWhyItDoesNotSupportAHeadSize) {
  AttentionDecode p;
  p.q_heads = p.kv_heads = 1;
  for (const int head_dim : {8, 40, 256}) {
    p.head_dim = head_dim;
    EXPECT_EQ(kernels::cpu::why_not(p), "");
  }
  for (const int head_dim : {0, 4, 12, 264}) {
    p.head_dim = head_dim;
    EXPECT_NE(kernels::cpu::why_not(p), "") << head_dim;
  }
  p.head_dim = 8;
  p.kv_heads = 2;
  p.q_heads = 3;
  EXPECT_NE(kernels::cpu::why_not(p), "");
}

}  // namespace
}  // namespace natslm::test
