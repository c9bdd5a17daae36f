// The lanes of a vector are 64 keys of a page (scores) or channels (values); up to six query rows
// share each load, which is what grouped-query attention and chunks live on. One page at a time:
// its keys and values are contiguous, so a single new token streams through memory in order.
//
// Softmax is online and in base 2; the running sum and the values are rescaled only when a row's
// maximum grows. The scale comes in with the exponent's multiply-add (folded into q it would be one
// more rounding of every channel).
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_decode.h"

#define HWY_DISABLED_TARGETS HWY_SSE4  // no gain here over SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "natslm/kernels/cpu/attention_decode.cc"
#include <hwy/aligned_allocator.h>
#include <hwy/foreach_target.h>  // compiles this file once for each target
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/cpu/decode_plan.h"
#include "natslm/kernels/cpu/tile_math-inl.h"
#include "natslm/kernels/decode_checks.h"

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr float kLog2e = 1.442695040888963f, kLn2 = 0.6931471805599453f;
constexpr float kNone = -std::numeric_limits<float>::infinity();
// Vectors that a micro-kernel computes side by side, times up to six rows: what the registers hold.
constexpr int kWide = kLanes == 16 ? 4 : 2;
constexpr int kMaxRows = 6;

template <class D>
HWY_INLINE hn::Vec<D> load_as_float(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> load_as_float(D d, const BFloat16* from) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToUnsigned<D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

// scores[m][j] = q[m] . keys[:, j] for the 64 keys of a page.
template <int kRows, class Element>
void score_rows(const float* HWY_RESTRICT q, const Element* HWY_RESTRICT keys, int head_dim,
                float* HWY_RESTRICT scores) {
  for (int j = 0; j < kPageKeys; j += kWide * kLanes) {
    Vec sum[kRows][kWide];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kWide; ++n) sum[m][n] = hn::Zero(kFloats);
    }
    for (int c = 0; c < head_dim; ++c) {
      Vec key[kWide];
#pragma GCC unroll 8
      for (int n = 0; n < kWide; ++n) {
        key[n] = load_as_float(kFloats, keys + c * kPageKeys + j + n * kLanes);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vec scalar = hn::Set(kFloats, q[m * head_dim + c]);
#pragma GCC unroll 8
        for (int n = 0; n < kWide; ++n) sum[m][n] = hn::MulAdd(scalar, key[n], sum[m][n]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kWide; ++n) {
        hn::Store(sum[m][n], kFloats, scores + m * kPageKeys + j + n * kLanes);
      }
    }
  }
}

// sum[m][c..] += weights[m][j] * values[j][c..] over `count` keys, for kN vectors of channels.
template <int kRows, int kN, class D, class Element>
HWY_INLINE void add_channels(D d, const float* HWY_RESTRICT weights,
                             const Element* HWY_RESTRICT values, int head_dim, int count,
                             float* HWY_RESTRICT sums) {
  constexpr int kStep = static_cast<int>(hn::MaxLanes(D()));
  hn::Vec<D> sum[kRows][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) sum[m][n] = hn::LoadU(d, sums + m * head_dim + n * kStep);
  }
  for (int j = 0; j < count; ++j) {
    hn::Vec<D> value[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) value[n] = load_as_float(d, values + j * head_dim + n * kStep);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const auto weight = hn::Set(d, weights[m * kPageKeys + j]);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sum[m][n] = hn::MulAdd(weight, value[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) hn::StoreU(sum[m][n], d, sums + m * head_dim + n * kStep);
  }
}

template <int kRows, class Element>
void add_values(const float* HWY_RESTRICT weights, const Element* HWY_RESTRICT values, int head_dim,
                int count, float* HWY_RESTRICT sums) {
  const hn::CappedTag<float, 8> eight;  // head sizes are multiples of it
  int c = 0;
  for (; c + kWide * kLanes <= head_dim; c += kWide * kLanes) {
    add_channels<kRows, kWide>(kFloats, weights, values + c, head_dim, count, sums + c);
  }
  for (; c + kLanes <= head_dim; c += kLanes) {
    add_channels<kRows, 1>(kFloats, weights, values + c, head_dim, count, sums + c);
  }
  if (c < head_dim) {
    add_channels<kRows, 1>(eight, weights, values + c, head_dim, count, sums + c);
  }
}

// Calls f<n>(first row) for groups of up to six rows that cover [0, rows).
template <class F>
HWY_INLINE void for_row_groups(int rows, const F& f) {
  int m = 0;
  for (; rows - m >= kMaxRows; m += kMaxRows) f.template operator()<kMaxRows>(m);
  switch (rows - m) {
    case 1:
      return f.template operator()<1>(m);
    case 2:
      return f.template operator()<2>(m);
    case 3:
      return f.template operator()<3>(m);
    case 4:
      return f.template operator()<4>(m);
    case 5:
      f.template operator()<3>(m);
      return f.template operator()<2>(m + 3);
  }
}

struct Bounds {
  int32_t min_position, max_position, min_last, max_last;
};

// Of the 64 keys of a page.
HWY_INLINE Bounds bounds_of(const int32_t* position, const int32_t* last) {
  auto min_position = hn::LoadU(kInts, position), max_position = min_position;
  auto min_last = hn::LoadU(kInts, last), max_last = min_last;
  for (int j = kLanes; j < kPageKeys; j += kLanes) {
    const auto p = hn::LoadU(kInts, position + j), l = hn::LoadU(kInts, last + j);
    min_position = hn::Min(min_position, p);
    max_position = hn::Max(max_position, p);
    min_last = hn::Min(min_last, l);
    max_last = hn::Max(max_last, l);
  }
  return {hn::GetLane(hn::MinOfLanes(kInts, min_position)),
          hn::GetLane(hn::MaxOfLanes(kInts, max_position)),
          hn::GetLane(hn::MinOfLanes(kInts, min_last)),
          hn::GetLane(hn::MaxOfLanes(kInts, max_last))};
}

// Sum of the weights of a row: 2^shift * total. Kept apart because their logarithm as a float would
// cost the second pass half its digits.
struct RowSum {
  float shift = kNone, total = 1;
  float log() const { return (shift + std::log2(total)) * kLn2; }
};

// What a worker needs besides the parameters.
struct Scratch {
  explicit Scratch(int head_dim)
      : q(hwy::AllocateAligned<float>(kDecodeBlockRows * head_dim)),
        sums(hwy::AllocateAligned<float>(kDecodeBlockRows * head_dim)),
        scores(hwy::AllocateAligned<float>(kDecodeBlockRows * kPageKeys)),
        totals(hwy::AllocateAligned<float>(kDecodeBlockRows * kLanes)),
        page(hwy::AllocateAligned<float>(kPageKeys * head_dim)) {}
  hwy::AlignedFreeUniquePtr<float[]> q, sums;  // [rows, D]
  hwy::AlignedFreeUniquePtr<float[]> scores;   // [rows, 64]
  hwy::AlignedFreeUniquePtr<float[]> totals;  // [rows, lanes]: sums of weights, a part in each lane
  hwy::AlignedFreeUniquePtr<float[]> page;    // half a bf16 page as floats
  float highest[kDecodeBlockRows];
  int32_t position[kDecodeBlockRows];
  int32_t key_position[kPageKeys], key_last[kPageKeys];
};

// The rows of a task against one page after the other.
template <class Element>
class BlockOfRows {
 public:
  BlockOfRows(const AttentionDecode& p, const DecodeTask& task, Scratch& scratch)
      : p_(p),
        task_(task),
        keys_(p.keys[task.list]),
        s_(scratch),
        d_(p.head_dim),
        q_scale_(p.scale > 0 ? 1.0f : p.scale),
        exponent_scale_(p.scale > 0 ? p.scale * kLog2e : kLog2e) {}

  void load_queries(int32_t row, int32_t rows) {
    row_ = row;
    rows_ = rows;
    for (int32_t m = 0; m < rows; ++m) {
      const int64_t at = row_of(p_, task_.list, row + m);
      read_row(p_.q, p_.dtype, at * d_, d_, q_scale_, s_.q.get() + m * d_);
      s_.position[m] = position_of(p_, task_.list, row + m);
    }
  }

  // Scores of the page that begins with key j, hidden ones -inf; false if no row sees any.
  bool score_page(int32_t j, int32_t count) {
    const int32_t *position = keys_.position + j, *last = keys_.last + j;
    if (count < kPageKeys) {  // neither list may be read past its end
      std::copy_n(position, count, s_.key_position);
      std::copy_n(last, count, s_.key_last);
      std::fill(s_.key_position + count, s_.key_position + kPageKeys, kForever);
      std::fill(s_.key_last + count, s_.key_last + kPageKeys, -1);
      position = s_.key_position;
      last = s_.key_last;
    }
    const Bounds b = bounds_of(position, last);
    const Tile tile = classify(s_.position[0], s_.position[rows_ - 1], b.min_position,
                               b.max_position, b.min_last, b.max_last);
    if (tile == Tile::kDead) return false;
    const auto* keys = static_cast<const Element*>(keys_.pages[j / kPageKeys]);
    with_floats(keys, kPageKeys * d_, [&](const auto* as_stored_or_float) {
      for_row_groups(rows_, [&]<int kRows>(int m) {
        score_rows<kRows>(s_.q.get() + m * d_, as_stored_or_float, d_,
                          s_.scores.get() + m * kPageKeys);
      });
    });
    if (tile == Tile::kPartial) hide(position, last);
    return true;
  }

  void attend() {
    load_queries(task_.row, task_.rows);
    std::fill_n(s_.highest, rows_, kNone);
    fill(s_.totals.get(), rows_ * kLanes, 0);
    fill(s_.sums.get(), int64_t{rows_} * d_, 0);
    for (int32_t j = task_.key; j < task_.key_end; j += kPageKeys) {
      const int32_t count = std::min(kPageKeys, task_.key_end - j);
      if (!score_page(j, count)) continue;
      for (int32_t m = 0; m < rows_; ++m) weigh(m);
      const auto* page = static_cast<const Element*>(keys_.pages[j / kPageKeys]);
      with_floats(page + kPageKeys * d_, count * d_, [&](const auto* values) {
        for_row_groups(rows_, [&]<int kRows>(int m) {
          add_values<kRows>(s_.scores.get() + m * kPageKeys, values, d_, count,
                            s_.sums.get() + m * d_);
        });
      });
    }
  }

  // Adds to mass[0..count) what the keys from j on received from these rows.
  void add_mass(int32_t j, int32_t count, const RowSum* sums, float* mass) {
    if (!score_page(j, count)) return;
    for (int v = 0; v < kPageKeys; v += kLanes) {
      Vec sum = hn::Zero(kFloats);
      for (int32_t m = 0; m < rows_; ++m) {
        const Vec score = hn::Load(kFloats, s_.scores.get() + m * kPageKeys + v);
        const RowSum& row = sums[row_of(p_, task_.list, row_ + m)];
        const Vec weight =
            exp2(hn::MulSub(score, hn::Set(kFloats, exponent_scale_), hn::Set(kFloats, row.shift)));
        const Vec share = hn::Mul(weight, hn::Set(kFloats, 1 / row.total));
        sum = hn::Add(sum, hn::IfThenElseZero(hn::Ne(score, hn::Set(kFloats, kNone)), share));
      }
      hn::Store(sum, kFloats, s_.page.get() + v);
    }
    for (int32_t i = 0; i < count; ++i) mass[i] += s_.page[i];
  }

  // The exponent of the largest weight of row m, to which the others are relative; -inf: it has
  // seen nothing.
  float shift(int32_t m) const { return s_.highest[m] * exponent_scale_; }
  float total(int32_t m) const {
    return hn::GetLane(hn::SumOfLanes(kFloats, hn::Load(kFloats, s_.totals.get() + m * kLanes)));
  }

 private:
  // A bf16 page that many rows share is widened once.
  template <class F>
  void with_floats(const Element* from, int count, const F& f) {
    if constexpr (std::is_same_v<Element, BFloat16>) {
      if (rows_ > kMaxRows) {
        read_row(from, DType::kBFloat16, 0, count, 1.0f, s_.page.get());
        return f(static_cast<const float*>(s_.page.get()));
      }
    }
    f(from);
  }

  void hide(const int32_t* position, const int32_t* last) {
    for (int32_t m = 0; m < rows_; ++m) {
      const auto i = hn::Set(kInts, s_.position[m]);
      float* scores = s_.scores.get() + m * kPageKeys;
      for (int j = 0; j < kPageKeys; j += kLanes) {
        const auto seen = hn::And(hn::Not(hn::Gt(hn::LoadU(kInts, position + j), i)),
                                  hn::Not(hn::Lt(hn::LoadU(kInts, last + j), i)));
        hn::Store(hn::IfThenElse(hn::RebindMask(kFloats, seen), hn::Load(kFloats, scores + j),
                                 hn::Set(kFloats, kNone)),
                  kFloats, scores + j);
      }
    }
  }

  static bool all_hidden(const float* scores) {
    for (int j = 0; j < kPageKeys; j += kLanes) {
      if (!hn::AllTrue(kFloats, hn::Eq(hn::Load(kFloats, scores + j), hn::Set(kFloats, kNone)))) {
        return false;
      }
    }
    return true;
  }

  // Scores of row m become weights 2^(score - highest); what was summed before is brought to a new
  // highest score.
  void weigh(int32_t m) {
    float* scores = s_.scores.get() + m * kPageKeys;
    Vec most = hn::Load(kFloats, scores);
    for (int j = kLanes; j < kPageKeys; j += kLanes) {
      most = hn::Max(most, hn::Load(kFloats, scores + j));
    }
    float highest = hn::GetLane(hn::MaxOfLanes(kFloats, most));
    // A maximum may lose a NaN.
    if (highest == kNone && !all_hidden(scores)) highest = std::numeric_limits<float>::quiet_NaN();
    float* total = s_.totals.get() + m * kLanes;
    if (!(highest <= s_.highest[m])) {
      const float before = shift(m);
      s_.highest[m] = highest;
      const float factor = before == kNone ? 0.0f : std::exp2(before - shift(m));
      for (int n = 0; n < kLanes; ++n) total[n] *= factor;
      float* sums = s_.sums.get() + int64_t{m} * d_;
      for (int c = 0; c < d_; ++c) sums[c] *= factor;
    }
    if (s_.highest[m] == kNone) return fill(scores, kPageKeys, 0);  // sees nothing so far
    const Vec scale = hn::Set(kFloats, exponent_scale_), most_of_row = hn::Set(kFloats, shift(m));
    Vec sum = hn::Load(kFloats, total);
    for (int j = 0; j < kPageKeys; j += kLanes) {
      const Vec weight = exp2(hn::MulSub(hn::Load(kFloats, scores + j), scale, most_of_row));
      sum = hn::Add(sum, weight);
      hn::Store(weight, kFloats, scores + j);
    }
    hn::Store(sum, kFloats, total);
  }

  const AttentionDecode& p_;
  const DecodeTask& task_;
  const CachedKeys& keys_;
  Scratch& s_;
  int d_;
  float q_scale_, exponent_scale_;  // the second is positive: a maximum stays one
  int32_t row_ = 0, rows_ = 0;
};

HWY_INLINE bool all_finite(const float* x, int count) {
  const hn::CappedTag<float, 8> d;
  auto poison = hn::Zero(d);  // 0 * x is NaN for every x that is not finite
  for (int c = 0; c < count; c += static_cast<int>(hn::Lanes(d))) {
    poison = hn::MulAdd(hn::LoadU(d, x + c), hn::Zero(d), poison);
  }
  return hn::AllTrue(d, hn::Eq(poison, hn::Zero(d)));
}

// One finished row: sums / total to the output.
void write_result(const AttentionDecode& p, int32_t list, int32_t packed, const float* sums,
                  RowSum row, RowSum* rows) {
  const int64_t at = row_of(p, list, packed);
  if (row.shift == kNone) {  // sees nothing
    write_row(sums, p.head_dim, 0.0f, p.out, p.dtype, at * p.head_dim);
  } else if (std::isfinite(row.total) && all_finite(sums, p.head_dim)) {
    write_row(sums, p.head_dim, 1.0f / row.total, p.out, p.dtype, at * p.head_dim);
  } else {  // 0 * infinity of a hidden key, or of a visible one?
    row = {kLog2e * attend_row_exactly(p, list, at, position_of(p, list, packed)), 1};
  }
  rows[at] = row;
}

// A partial result: sums [rows, D], then totals [rows], then highest scores [rows].
void merge(const AttentionDecode& p, const DecodePlan& plan, const DecodePlan::Cut& cut,
           const float* partials, RowSum* rows) {
  const DecodeTask& first = plan.tasks[cut.begin];
  const int d = p.head_dim;
  std::vector<float> sums(d);
  for (int32_t m = 0; m < first.rows; ++m) {
    float highest = kNone, total = 0;
    std::fill(sums.begin(), sums.end(), 0.0f);
    const auto part = [&](int64_t task) { return partials + plan.tasks[task].partial; };
    const auto highest_of = [&](int64_t task) {
      return part(task)[int64_t{first.rows} * (d + 1) + m];
    };
    for (int64_t task = cut.begin; task < cut.end; ++task) {
      const float other = highest_of(task);
      if (!(other <= highest)) highest = other;  // takes a NaN too
    }
    for (int64_t task = cut.begin; task < cut.end; ++task) {
      if (highest_of(task) == kNone) continue;
      const float factor = std::exp2(highest_of(task) - highest);
      total += factor * part(task)[int64_t{first.rows} * d + m];
      const float* from = part(task) + int64_t{m} * d;
      for (int c = 0; c < d; ++c) sums[c] += factor * from[c];
    }
    write_result(p, first.list, m, sums.data(), {highest, total}, rows);
  }
}

template <class Element>
void run_typed(const AttentionDecode& p) {
  const DecodePlan plan = plan_decode(p);
  std::vector<Scratch> scratch;
  for (int worker = 0; worker < std::max(1, p.parallel.workers); ++worker) {
    scratch.emplace_back(p.head_dim);
  }
  std::vector<RowSum> rows(int64_t{p.rows} * p.q_heads);
  const auto partials = hwy::AllocateAligned<float>(std::max<int64_t>(1, plan.partial_floats));
  p.parallel(static_cast<int64_t>(plan.tasks.size()), [&](int64_t t, int worker) {
    const DecodeTask& task = plan.tasks[t];
    Scratch& s = scratch[worker];
    BlockOfRows<Element> block(p, task, s);
    block.attend();
    for (int32_t m = 0; m < task.rows; ++m) {
      const float* sums = s.sums.get() + int64_t{m} * p.head_dim;
      if (task.partial < 0) {
        write_result(p, task.list, task.row + m, sums, {block.shift(m), block.total(m)},
                     rows.data());
        continue;
      }
      float* to = partials.get() + task.partial;
      std::copy_n(sums, p.head_dim, to + int64_t{m} * p.head_dim);
      to[int64_t{task.rows} * p.head_dim + m] = block.total(m);
      to[int64_t{task.rows} * (p.head_dim + 1) + m] = block.shift(m);
    }
  });
  if (!plan.cuts.empty()) {
    p.parallel(static_cast<int64_t>(plan.cuts.size()),
               [&](int64_t c, int) { merge(p, plan, plan.cuts[c], partials.get(), rows.data()); });
  }
  if (p.lse) {
    for (size_t i = 0; i < rows.size(); ++i) p.lse[i] = rows[i].log();
  }

  const std::vector<DecodeTask> mass = plan_mass(p);
  if (mass.empty()) return;
  p.parallel(static_cast<int64_t>(mass.size()), [&](int64_t t, int worker) {
    const DecodeTask& task = mass[t];
    BlockOfRows<Element> block(p, task, scratch[worker]);
    float* to = p.keys[task.list].mass;
    fill(to + task.key, task.key_end - task.key, 0);
    for (int32_t row = 0; row < task.rows; row += kDecodeBlockRows) {
      block.load_queries(row, std::min(kDecodeBlockRows, task.rows - row));
      for (int32_t j = task.key; j < task.key_end; j += kPageKeys) {
        block.add_mass(j, std::min(kPageKeys, task.key_end - j), rows.data(), to + j);
      }
    }
  });
}

void run_decode(const AttentionDecode& p) {
  if (p.dtype == DType::kFloat32) {
    run_typed<float>(p);
  } else {
    run_typed<BFloat16>(p);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace natslm::kernels::cpu {

HWY_EXPORT(run_decode);

std::string_view why_not(const AttentionDecode& p) {
  const std::string_view shapes = why_not_decode_shapes(p);
  return shapes.empty() ? why_not_cpu_head_dim(p.head_dim) : shapes;
}

void run(const AttentionDecode& p) {
  check_decode_supported("attention_decode (cpu)", why_not(p), p);
  HWY_DYNAMIC_DISPATCH(run_decode)(p);
}

}  // namespace natslm::kernels::cpu
#endif  // HWY_ONCE
