// Attention forward for CPUs: a tile of queries gathers the keys that are alive for it.
//
// A task is a tile of consecutive queries of one KV head, with all query heads of the group side by
// side (row = position * group + head), so that one packed key serves them all. The rows form
// blocks of kBlockRows; a block holds its queries and its output transposed (tile_math-inl.h). The
// gathered keys come in batches of kBatch, the ones that every query of the tile reads first: only
// groups of keys behind them need a test per element, and only on the row blocks that they reach.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_forward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "natslm/kernels/cpu/attention_forward.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/cpu/live_keys.h"
#include "natslm/kernels/cpu/scratch_memory.h"
#include "natslm/kernels/cpu/tile_math-inl.h"
#include "natslm/kernels/element.h"

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

// The kernel's sizes. Measured on Zen 3 (AVX2) with 64 channels.
struct Config {
  // Bounds of a tile's rows (tile_of), and how many tiles a text is cut into between them. A tall
  // tile packs a key for more rows, but keys that only some of its queries see cost it more, and
  // few tiles keep few workers busy. From 192 to 576 rows: 2 to 5 % faster at 4,096 and 16,384
  // tokens, slower at 2,048.
  static constexpr int kFewestRows = 192, kMostRows = 576, kTilesOfText = 32;
  // Keys packed together: with their values 32 KB at 64 channels.
  static constexpr int kBatch = 64;
};
static_assert(Config::kBatch % kGroup == 0);
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The sizes that all tasks share.
struct Plan {
  explicit Plan(const AttentionForward& p)
      : group(p.q_heads / p.kv_heads),
        tile(tile_of(group, std::clamp(p.tokens / Config::kTilesOfText * group, Config::kFewestRows,
                                       Config::kMostRows))),
        blocks(tile * group / kBlockRows),
        rows(tile * group),
        head_dim(p.head_dim),
        query_factor(p.scale > 0 ? 1.0f : p.scale),
        scale(p.scale > 0 ? p.scale : 1.0f) {}
  int group, tile, blocks, rows, head_dim;
  float query_factor;  // of packed queries: 1, so that they stay exact, where the scale allows it
  float scale;  // what is left to multiply a score with; positive, so that maxima stay maxima
};

// What a worker needs for one task; kept from task to task.
struct Scratch {
  explicit Scratch(const Plan& plan, int tokens) : keys(tokens + 1) {
    const int64_t d = plan.head_dim;
    const int64_t sizes[] = {plan.rows * d,
                             plan.rows * d,
                             Config::kBatch * kRowStride,
                             Config::kBatch * kRowStride,
                             Config::kBatch * kBlockRows,
                             kBlockRows * d,
                             plan.rows,
                             plan.rows};
    memory = scratch_memory(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}));
    float* next = memory.get();
    float** const parts[] = {&q, &out, &k, &v, &score, &row_major, &max, &sum};
    for (int i = 0; i < 8; ++i) {
      *parts[i] = next;
      next += sizes[i];
    }
    position.resize(plan.rows);
  }
  ScratchMemory memory;
  float* q;          // [blocks][D][kBlockRows], times query_factor
  float* out;        // [blocks][D][kBlockRows], not yet divided by `sum`
  float* k;          // [kBatch][kRowStride]
  float* v;          // [kBatch][kRowStride]
  float* score;      // [kBatch][kBlockRows]: q . k, then weights
  float* row_major;  // [kBlockRows][D]
  float* max;        // [blocks][kBlockRows]: largest score so far; lse in the mass pass
  float* sum;        // [blocks][kBlockRows]: of the weights
  std::vector<int32_t> position;  // [blocks][kBlockRows]; past the tile: -1, which sees no key
  std::vector<int32_t> keys;      // the gathered keys
};

// kGroup consecutive gathered keys.
struct KeyGroup {
  int32_t key[kGroup], last[kGroup];
  int first_block, end_block;  // row blocks in which a query may see one of them
  bool full;                   // every query of the tile sees all of them
};

// One tile of queries of one KV head.
class Tile {
 public:
  Tile(const AttentionForward& p, const Plan& plan, Scratch& scratch, int b, int kv_head,
       const LiveKeys& live, int tile)
      : p_(p), plan_(plan), s_(scratch), b_(b), kv_head_(kv_head), q0_(tile * plan.tile) {
    const int length = length_of(p.lengths, b, p.tokens);
    q1_ = std::min(q0_ + plan.tile, length) - 1;
    last_ = p.last + (int64_t{b} * p.kv_heads + kv_head) * p.tokens;
    count_ = live.find(q0_, q1_, s_.keys.data(), &full_);
  }

  void attend() {
    read_queries();
    fill(s_.out, int64_t{plan_.rows} * plan_.head_dim, 0);
    fill(s_.max, plan_.rows, kLowest);
    fill(s_.sum, plan_.rows, 0);
    for (int begin = 0; begin < count_; begin += Config::kBatch) {
      read_keys(begin, /*with_values=*/true);
      for (int block = 0; block < plan_.blocks; ++block) {
        const int slots = score(block);
        if (slots == 0) continue;
        soften(block, slots);
        values_are_finite_ ? accumulate(block) : accumulate_visible(block);
      }
    }
    write_output();
  }

  // Adds to mass[j] what each key received, from the finished lse.
  void add_mass(float* mass) {
    read_queries();
    read_normalisers();
    for (int begin = 0; begin < count_; begin += Config::kBatch) {
      read_keys(begin, /*with_values=*/false);
      for (int block = 0; block < plan_.blocks; ++block) {
        score(block);
        const float* lse = s_.max + block * kBlockRows;
        for (int slot = 0; slot < active_count_; ++slot) {
          const KeyGroup& group = groups_[active_[slot]];
          for (int m = 0; m < kGroup; ++m) {
            const float* s = s_.score + (slot * kGroup + m) * kBlockRows;
            Vec w = hn::Zero(kFloats);
            for (int n = 0; n < kBlockRows; n += kLanes) {
              w = hn::Add(w, weight(s + n, hn::Load(kFloats, lse + n)));
            }
            if (group.key[m] != kForever)
              mass[group.key[m]] += hn::GetLane(hn::SumOfLanes(kFloats, w));
          }
        }
      }
    }
  }

 private:
  int row_count() const { return (q1_ - q0_ + 1) * plan_.group; }
  int query_head(int r) const { return kv_head_ * plan_.group + r % plan_.group; }
  int64_t lse_at(int r) const {
    return (int64_t{b_} * p_.q_heads + query_head(r)) * p_.tokens + q0_ + r / plan_.group;
  }

  // exp(scale * product - normaliser).
  Vec weight(const float* product, Vec normaliser) const {
    const Vec x = hn::MulSub(hn::Load(kFloats, product), hn::Set(kFloats, plan_.scale), normaliser);
    return exp(x);
  }

  void read_queries() {
    for (int block = 0; block < plan_.blocks; ++block) {
      for (int i = 0; i < kBlockRows; ++i) {
        const int r = block * kBlockRows + i;
        float* to = s_.row_major + i * plan_.head_dim;
        if (r < row_count()) {
          const int position = q0_ + r / plan_.group;
          s_.position[r] = position;
          read_row(p_.q, p_.dtype, row(p_.q_stride, b_, query_head(r), position), plan_.head_dim,
                   plan_.query_factor, to);
        } else {
          s_.position[r] = -1;
          fill(to, plan_.head_dim, 0);
        }
      }
      transpose(s_.row_major, plan_.head_dim, kBlockRows, plan_.head_dim,
                s_.q + int64_t{block} * plan_.head_dim * kBlockRows, kBlockRows);
    }
  }

  // For the second pass. +inf gives a row that sees nothing the probability 0.
  void read_normalisers() {
    for (int r = 0; r < plan_.rows; ++r) {
      const float lse = r < row_count() ? p_.lse[lse_at(r)] : -kInfinity;
      s_.max[r] = lse == -kInfinity ? kInfinity : lse;
    }
  }

  // Packs the gathered keys from `begin` on and forms their groups.
  void read_keys(int begin, bool with_values) {
    const int end = std::min(begin + Config::kBatch, count_), d = plan_.head_dim;
    group_count_ = (end - begin + kGroup - 1) / kGroup;
    values_are_finite_ = true;
    for (int g = 0; g < group_count_; ++g) {
      KeyGroup& group = groups_[g];
      group.full = begin + (g + 1) * kGroup <= full_;
      int32_t first = kForever, last = -1;
      for (int m = 0; m < kGroup; ++m) {
        const int at = begin + g * kGroup + m;
        float* k = s_.k + (g * kGroup + m) * kRowStride;
        float* v = s_.v + int64_t{g * kGroup + m} * d;
        if (at >= end) {  // nobody sees the keys that fill the group up
          group.key[m] = kForever;
          group.last[m] = -1;
          fill(k, d, 0);
          if (with_values) fill(v, d, 0);
          continue;
        }
        const int32_t j = s_.keys[at];
        group.key[m] = j;
        group.last[m] = last_[j];
        first = std::min(first, j);
        last = std::max(last, last_[j]);
        read_row(p_.k, p_.dtype, row(p_.k_stride, b_, kv_head_, j), d, 1.0f, k);
        if (with_values) {
          values_are_finite_ &=
              read_row(p_.v, p_.dtype, row(p_.v_stride, b_, kv_head_, j), d, 1.0f, v);
        }
      }
      group.first_block = std::max(first - q0_, 0) * plan_.group / kBlockRows;
      group.end_block =
          ((std::min(last, q1_) - q0_ + 1) * plan_.group + kBlockRows - 1) / kBlockRows;
    }
    prefetch(end, with_values);
  }

  // Asks for the rows of the next batch: gathered rows are beyond what the hardware foresees.
  void prefetch(int begin, bool with_values) const {
    const int end = std::min(begin + Config::kBatch, count_);
    const int64_t bytes = plan_.head_dim * size_of(p_.dtype);
    for (int at = begin; at < end; ++at) {
      const auto touch = [&](const void* array, const Strides& stride) {
        const char* from = static_cast<const char*>(array) +
                           row(stride, b_, kv_head_, s_.keys[at]) * size_of(p_.dtype);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
      };
      touch(p_.k, p_.k_stride);
      if (with_values) touch(p_.v, p_.v_stride);
    }
  }

  // Scores of the batch's groups that reach the row block, those hidden replaced by -inf; returns
  // how many keys that are.
  int score(int block) {
    active_count_ = 0;
    const int d = plan_.head_dim;
    for (int g = 0; g < group_count_; ++g) {
      if (block < groups_[g].first_block || block >= groups_[g].end_block) continue;
      float* to = s_.score + active_count_ * kGroup * kBlockRows;
      products_of_rows(s_.k + g * kGroup * kRowStride, s_.q + int64_t{block} * d * kBlockRows, d,
                       to);
      if (!groups_[g].full) hide(groups_[g], block, to);
      active_[active_count_++] = g;
    }
    return active_count_ * kGroup;
  }

  void hide(const KeyGroup& group, int block, float* score) const {
    for (int n = 0; n < kVectors; ++n) {
      const auto position = hn::LoadU(kInts, s_.position.data() + block * kBlockRows + n * kLanes);
      for (int m = 0; m < kGroup; ++m) {
        float* s = score + m * kBlockRows + n * kLanes;
        const auto hidden = hn::Or(hn::Gt(hn::Set(kInts, group.key[m]), position),
                                   hn::Gt(position, hn::Set(kInts, group.last[m])));
        hn::Store(hn::IfThenElse(hn::RebindMask(kFloats, hidden), hn::Set(kFloats, -kInfinity),
                                 hn::Load(kFloats, s)),
                  kFloats, s);
      }
    }
  }

  // Scores become weights relative to the new maximum; `correction_` is for what was summed before.
  void soften(int block, int slots) {
    for (int n = 0; n < kVectors; ++n) {
      float* score = s_.score + n * kLanes;
      float* max = s_.max + block * kBlockRows + n * kLanes;
      float* sum = s_.sum + block * kBlockRows + n * kLanes;
      const Vec old_max = hn::Load(kFloats, max);
      Vec max0 = hn::Set(kFloats, -kInfinity), max1 = max0;
      for (int i = 0; i < slots; i += 2) {
        max0 = hn::Max(max0, hn::Load(kFloats, score + i * kBlockRows));
        max1 = hn::Max(max1, hn::Load(kFloats, score + (i + 1) * kBlockRows));
      }
      const Vec new_max =
          hn::Max(old_max, hn::Mul(hn::Set(kFloats, plan_.scale), hn::Max(max0, max1)));
      const Vec correction = exp(hn::Sub(old_max, new_max));
      Vec sum0 = hn::Mul(correction, hn::Load(kFloats, sum)), sum1 = hn::Zero(kFloats);
      for (int i = 0; i < slots; i += 2) {
        float* s = score + i * kBlockRows;
        const Vec w0 = weight(s, new_max);
        const Vec w1 = weight(s + kBlockRows, new_max);
        hn::Store(w0, kFloats, s);
        hn::Store(w1, kFloats, s + kBlockRows);
        sum0 = hn::Add(sum0, w0);
        sum1 = hn::Add(sum1, w1);
      }
      hn::Store(new_max, kFloats, max);
      hn::Store(hn::Add(sum0, sum1), kFloats, sum);
      hn::Store(correction, kFloats, correction_ + n * kLanes);
    }
  }

  // out = correction * out + weights * values.
  void accumulate(int block) {
    const int d = plan_.head_dim;
    for (int c0 = 0; c0 < d; c0 += kScalars) {
      float* out = s_.out + (int64_t{block} * d + c0) * kBlockRows;
      Vec acc[kScalars][kVectors];
#pragma GCC unroll 8
      for (int m = 0; m < kScalars; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) {
          acc[m][n] = hn::Mul(hn::Load(kFloats, correction_ + n * kLanes),
                              hn::Load(kFloats, out + m * kBlockRows + n * kLanes));
        }
      }
      if (active_count_ == group_count_) {
        multiply_add<false>(s_.v + c0, d, s_.score, kBlockRows, group_count_ * kGroup, acc);
      } else {
        for (int slot = 0; slot < active_count_; ++slot) {
          multiply_add<false>(s_.v + int64_t{active_[slot]} * kGroup * d + c0, d,
                              s_.score + slot * kGroup * kBlockRows, kBlockRows, kGroup, acc);
        }
      }
      store_rows([&](int m) { return out + m * kBlockRows; }, kScalars, acc);
    }
  }

  // The same when a value is infinite or NaN: a hidden key's weight of 0 would not make it vanish.
  void accumulate_visible(int block) {
    const int d = plan_.head_dim;
    for (int i = 0; i < kBlockRows; ++i) {
      const int32_t position = s_.position[block * kBlockRows + i];
      for (int c = 0; c < d; ++c) {
        float* out = s_.out + (int64_t{block} * d + c) * kBlockRows + i;
        *out *= correction_[i];
        for (int slot = 0; slot < active_count_; ++slot) {
          const KeyGroup& group = groups_[active_[slot]];
          for (int m = 0; m < kGroup; ++m) {
            if (!visible(position, group.key[m], group.last[m])) continue;
            *out += s_.score[(slot * kGroup + m) * kBlockRows + i] *
                    s_.v[int64_t{active_[slot] * kGroup + m} * d + c];
          }
        }
      }
    }
  }

  void write_output() {
    const int d = plan_.head_dim;
    for (int block = 0; block * kBlockRows < row_count(); ++block) {
      transpose(s_.out + int64_t{block} * d * kBlockRows, kBlockRows, d, kBlockRows, s_.row_major,
                d);
      const int end = std::min(row_count() - block * kBlockRows, kBlockRows);
      for (int i = 0; i < end; ++i) {
        const int r = block * kBlockRows + i;
        const float sum = s_.sum[r];
        const bool sees_nothing = sum == 0;
        p_.lse[lse_at(r)] = sees_nothing ? -kInfinity : s_.max[r] + std::log(sum);
        write_row(s_.row_major + i * d, d, sees_nothing ? 0.0f : 1 / sum, p_.out, p_.dtype,
                  row(p_.out_stride, b_, query_head(r), q0_ + r / plan_.group));
      }
    }
  }

  const AttentionForward& p_;
  const Plan& plan_;
  Scratch& s_;
  const int b_, kv_head_, q0_;
  int q1_, count_, full_ = 0;
  const int32_t* last_;

  KeyGroup groups_[Config::kBatch / kGroup];
  int group_count_ = 0;
  int active_[Config::kBatch / kGroup];  // groups that reach the current row block
  int active_count_ = 0;
  bool values_are_finite_ = true;
  HWY_ALIGN float correction_[kBlockRows];
};

struct Task {
  int32_t b, kv_head, tile;
  int64_t cost;
};

void run_vectors(const AttentionForward& p) {
  NATSLM_ASSERT(hn::Lanes(kFloats) == kLanes);
  const Plan plan(p);

  std::vector<LiveKeys> live;
  std::vector<Task> tasks;
  for (int b = 0; b < p.batch; ++b) {
    const int length = length_of(p.lengths, b, p.tokens);
    for (int h = 0; h < p.kv_heads; ++h) {
      live.emplace_back(p.last + (int64_t{b} * p.kv_heads + h) * p.tokens, length);
      const std::vector<int64_t> cost = live.back().count(plan.tile, length);
      for (int t = 0; t < static_cast<int>(cost.size()); ++t) tasks.push_back({b, h, t, cost[t]});
    }
  }
  // Longest first, so that no long task is left for the end.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& x, const Task& y) { return x.cost > y.cost; });

  std::vector<std::unique_ptr<Scratch>> scratch(p.parallel.workers);
  const auto scratch_of = [&](int worker) -> Scratch& {
    if (!scratch[worker]) scratch[worker] = std::make_unique<Scratch>(plan, p.tokens);
    return *scratch[worker];
  };
  p.parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    const Task& t = tasks[i];
    Tile(p, plan, scratch_of(worker), t.b, t.kv_head, live[t.b * p.kv_heads + t.kv_head], t.tile)
        .attend();
  });
  if (!p.mass) return;

  // A fixed number of parts, each with sums of its own, keeps the result independent of workers.
  const int heads = p.batch * p.kv_heads;
  const int tiles = (p.tokens + plan.tile - 1) / plan.tile;
  const int parts = std::clamp(16 / std::max(heads, 1), 1, std::max(tiles, 1));
  std::vector<float> sums(int64_t{heads} * parts * p.tokens, 0.0f);
  p.parallel(int64_t{heads} * parts, [&](int64_t i, int worker) {
    const int head = static_cast<int>(i / parts), part = static_cast<int>(i % parts);
    const int b = head / p.kv_heads, length = length_of(p.lengths, b, p.tokens);
    for (int t = part; t * plan.tile < length; t += parts) {
      Tile(p, plan, scratch_of(worker), b, head % p.kv_heads, live[head], t)
          .add_mass(sums.data() + i * p.tokens);
    }
  });
  for (int head = 0; head < heads; ++head) {
    for (int j = 0; j < p.tokens; ++j) {
      float sum = 0;
      for (int part = 0; part < parts; ++part) {
        sum += sums[(int64_t{head} * parts + part) * p.tokens + j];
      }
      p.mass[int64_t{head} * p.tokens + j] = sum;
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace natslm::kernels::cpu {
namespace {

HWY_EXPORT(run_vectors);

void clear_padding(const AttentionForward& p) {
  for (int b = 0; b < p.batch; ++b) {
    for (int h = 0; h < p.q_heads; ++h) {
      for (int t = length_of(p.lengths, b, p.tokens); t < p.tokens; ++t) {
        p.lse[(int64_t{b} * p.q_heads + h) * p.tokens + t] =
            -std::numeric_limits<float>::infinity();
        // All bits 0 is the number 0 in both types.
        std::memset(static_cast<char*>(p.out) + row(p.out_stride, b, h, t) * size_of(p.dtype), 0,
                    p.head_dim * size_of(p.dtype));
      }
    }
  }
}

}  // namespace

std::string_view why_not(const AttentionForward& p) {
  const std::string_view shapes = why_not_shapes(p);
  return shapes.empty() ? why_not_cpu_head_dim(p.head_dim) : shapes;
}

void run(const AttentionForward& p) {
  check_supported("attention_forward (cpu)", why_not(p), p);
  clear_padding(p);
  HWY_DYNAMIC_DISPATCH(run_vectors)(p);
}

}  // namespace natslm::kernels::cpu
#endif  // HWY_ONCE
