// One tile of attention backward for CPUs, compiled once per instruction set. Internal to
// attention_backward.cc.
//
// A tile of queries of one KV head (rows and blocks as in attention_forward.cc) walks over keys in
// batches. For every pair of the batch it forms the score and dout . v; from them g, and for the
// keys that are alive for the tile the probability P and its gradient dS, which collect in slots.
// Whenever enough slots are full, dv += P dout, dk += dS q and dq += dS k run over the slots alone.
// Without horizons only live keys are walked over at all.
// SPDX-License-Identifier: Apache-2.0
#if defined(NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_TILE_INL_H_
#undef NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_TILE_INL_H_
#else
#define NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/cpu/attention_backward_memory-inl.h"
#include "natslm/kernels/cpu/live_keys.h"
#include "natslm/kernels/cpu/tile_math-inl.h"
#include "natslm/kernels/element.h"

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

struct Key {
  int32_t j = kForever, last = -1;
  Slots* slots = nullptr;  // where a live key's P and dS go, and the place there
  int slot = 0;
  bool past = false;    // every query of the tile comes after it
  bool full = false;    // every query of the tile sees it
  bool ending = false;  // a horizon lies inside the tile
};

class Tile {
 public:
  Tile(const AttentionBackward& p, const Plan& plan, Scratch& scratch, Sums& sums, int b,
       int kv_head, const LiveKeys& live, int tile)
      : p_(p),
        plan_(plan),
        s_(scratch),
        sums_(sums),
        b_(b),
        kv_head_(kv_head),
        q0_(tile * plan.tile),
        q1_(std::min(q0_ + plan.tile, length_of(p.lengths, b, p.tokens)) - 1),
        kv_row_((int64_t{b} * p.kv_heads + kv_head) * p.tokens),
        last_(p.last + kv_row_) {
    if (p.horizon_count > 0) {
      find_keys_with_a_horizon();
    } else {
      int32_t full;
      count_ = live.find(q0_, q1_, s_.keys.data(), &full);
    }
  }

  void run() {
    read_rows();
    fill(s_.dq_columns, int64_t{plan_.rows} * plan_.head_dim, 0);
    for (int begin = 0; begin < count_; begin += Config::kBatch) {
      read_keys(begin);
      for (int block = 0; block < plan_.blocks; ++block) {
        for (int g = 0; g < group_count_; ++g) {
          if (block >= first_block_[g] && block < end_block_[g]) walk(g, block);
        }
      }
      if (p_.horizon_count > 0) add_role_sums();
      for (Slots* slots : {&s_.whole, &s_.partial}) {
        if (slots->count >= Config::kFullSlots) work_off(*slots);
      }
    }
    work_off(s_.whole);
    work_off(s_.partial);
    write_dq();
  }

 private:
  int row_count() const { return (q1_ - q0_ + 1) * plan_.group; }
  int query_head(int r) const { return kv_head_ * plan_.group + r % plan_.group; }
  int query(int r) const { return q0_ + r / plan_.group; }
  int32_t horizon(int h, int32_t j) const {
    return p_.horizons[h * int64_t{p_.batch} * p_.kv_heads * p_.tokens + kv_row_ + j];
  }

  // Live keys have to be walked over even where every horizon has passed.
  void find_keys_with_a_horizon() {
    count_ = 0;
    for (int32_t j = 0; j <= q1_; ++j) {
      int32_t furthest = last_[j];
      for (int h = 0; h < p_.horizon_count; ++h) furthest = std::max(furthest, horizon(h, j));
      if (furthest >= std::max(q0_, j)) s_.keys[count_++] = j;
    }
  }

  void read_rows() {
    const int d = plan_.head_dim;
    for (int r = 0; r < plan_.rows; ++r) {
      const bool used = r < row_count();
      s_.position[r] = used ? query(r) : -1;
      s_.lse[r] = s_.role_lse[r] = kInfinity;
      for (int piece = 0; piece < plan_.pieces; ++piece) {
        float* q = s_.q + (int64_t{piece} * plan_.rows + r) * kBlockRows;
        float* dout = s_.dout + (int64_t{piece} * plan_.rows + r) * kBlockRows;
        if (!used) {
          fill(q, kBlockRows, 0);
          fill(dout, kBlockRows, 0);
          continue;
        }
        const int64_t c0 = int64_t{piece} * kBlockRows;
        const auto read = [&](const void* from, const Strides& stride, float* to) {
          read_row(from, p_.dtype, row(stride, b_, query_head(r), query(r)) + c0,
                   plan_.piece_width(piece), 1.0f, to);
        };
        read(p_.q, p_.q_stride, q);
        read(p_.dout, p_.dout_stride, dout);
      }
      if (!used) continue;
      const int64_t at = (int64_t{b_} * p_.q_heads + query_head(r)) * p_.tokens + query(r);
      if (p_.lse[at] == -kInfinity) continue;
      s_.lse[r] = p_.lse[at];
      s_.role_lse[r] = p_.role_lse ? p_.role_lse[at] : p_.lse[at];
    }
    for (int block = 0; block < plan_.blocks; ++block) {
      for (int piece = 0; piece < plan_.pieces; ++piece) {
        const int64_t from = (int64_t{piece} * plan_.rows + block * kBlockRows) * kBlockRows;
        const int64_t to = (int64_t{block} * d + piece * kBlockRows) * kBlockRows;
        transpose(s_.q + from, kBlockRows, kBlockRows, plan_.piece_width(piece), s_.q_columns + to,
                  kBlockRows);
        transpose(s_.dout + from, kBlockRows, kBlockRows, plan_.piece_width(piece),
                  s_.dout_columns + to, kBlockRows);
      }
      read_delta(block);
    }
  }

  // Sums over channels in the same order as dout . v: where a query sees one key alone, out = v and
  // the difference of the two is exactly 0.
  void read_delta(int block) {
    const int d = plan_.head_dim;
    for (int i = 0; i < kBlockRows; ++i) {
      const int r = block * kBlockRows + i;
      float* to = s_.row_major + i * d;
      if (r < row_count()) {
        read_row(p_.out, p_.dtype, row(p_.out_stride, b_, query_head(r), query(r)), d, 1.0f, to);
      } else {
        fill(to, d, 0);
      }
    }
    transpose(s_.row_major, d, kBlockRows, d, s_.out_columns, kBlockRows);
    for (int n = 0; n < kBlockRows; n += kLanes) {
      const float* dout = s_.dout_columns + int64_t{block} * d * kBlockRows + n;
      Vec sum = hn::Zero(kFloats);
      for (int c = 0; c < d; ++c) {
        sum = hn::MulAdd(hn::Load(kFloats, s_.out_columns + c * kBlockRows + n),
                         hn::Load(kFloats, dout + c * kBlockRows), sum);
      }
      hn::Store(sum, kFloats, s_.delta + block * kBlockRows + n);
    }
  }

  // Packs the keys from `begin` on, gives the live ones a slot and forms groups.
  void read_keys(int begin) {
    const int end = std::min(begin + Config::kBatch, count_), d = plan_.head_dim;
    group_count_ = (end - begin + kGroup - 1) / kGroup;
    fill(s_.g_sum, Config::kBatch * kLanes, 0);
    fill(s_.g_partial, int64_t{p_.horizon_count} * Config::kBatch * kLanes, 0);
    for (int g = 0; g < group_count_; ++g) {
      int32_t first = kForever, furthest = -1;
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        float *k = s_.k + i * kRowStride, *v = s_.v + i * kRowStride;
        Key& key = keys_[i];
        key = Key();
        if (begin + i >= end) {  // fills the group up; no query sees it
          fill(k, d, 0);
          fill(v, d, 0);
          continue;
        }
        const int32_t j = s_.keys[begin + i];
        key.j = j;
        key.last = last_[j];
        key.past = j <= q0_;
        key.full = key.past && key.last >= q1_;
        first = std::min(first, j);
        furthest = std::max(furthest, key.last);
        for (int h = 0; h < p_.horizon_count; ++h) {
          const int32_t horizon_h = horizon(h, j);
          furthest = std::max(furthest, horizon_h);
          key.ending |= horizon_h >= std::max(q0_, j) && horizon_h < q1_;
        }
        read_row(p_.k, p_.dtype, row(p_.k_stride, b_, kv_head_, j), d, 1.0f, k);
        read_row(p_.v, p_.dtype, row(p_.v_stride, b_, kv_head_, j), d, 1.0f, v);
        if (key.last >= std::max(q0_, j)) take_slot(key, k);
      }
      first_block_[g] = first_block_of(first);
      end_block_[g] = end_block_of(furthest);
    }
  }

  int first_block_of(int32_t j) const { return std::max(j - q0_, 0) * plan_.group / kBlockRows; }
  int end_block_of(int32_t last) const {
    return ((std::min(last, q1_) - q0_ + 1) * plan_.group + kBlockRows - 1) / kBlockRows;
  }

  void take_slot(Key& key, const float* k) {
    key.slots = key.full ? &s_.whole : &s_.partial;
    Slots& slots = *key.slots;
    sums_.use(key.j);
    const int i = key.slot = slots.count++;
    slots.key[i] = key.j;
    slots.first_block[i] = first_block_of(key.j);
    slots.end_block[i] = end_block_of(key.last);
    std::memcpy(slots.k + i * kRowStride, k, plan_.head_dim * sizeof(float));
    for (int block = 0; block < plan_.blocks; ++block) {
      if (block >= slots.first_block[i] && block < slots.end_block[i]) continue;
      fill(slots.at(slots.p, block, i), kBlockRows, 0);
      fill(slots.at(slots.ds, block, i), kBlockRows, 0);
    }
  }

  // The pairs of a group of keys and a block of rows: g, and P and dS of live keys.
  void walk(int g, int block) {
    const int d = plan_.head_dim;
    products_of_rows(s_.k + g * kGroup * kRowStride, s_.q_columns + int64_t{block} * d * kBlockRows,
                     d, s_.score);
    products_of_rows(s_.v + g * kGroup * kRowStride,
                     s_.dout_columns + int64_t{block} * d * kBlockRows, d, s_.dscore);
    const int r = block * kBlockRows;
    const float *lse = s_.lse + r, *role_lse = s_.role_lse + r, *delta = s_.delta + r;
    const int32_t* position = s_.position.data() + r;
    const bool with_roles = p_.horizon_count > 0, two_normalisers = with_roles && p_.role_lse;
    const Vec scale = hn::Set(kFloats, p_.scale);
    const Vec limit = hn::Set(kFloats, p_.limit_factor ? 0.0f : 89.0f);
    // One key at a time: what is decided about it is decided once for all its vectors.
    for (int m = 0; m < kGroup; ++m) {
      const Key& key = keys_[g * kGroup + m];
      const float *score = s_.score + m * kBlockRows, *dscore = s_.dscore + m * kBlockRows;
      Vec p[kVectors], difference[kVectors], gradient[kVectors];
      factors(score, scale, lse, limit, p);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        difference[n] =
            hn::Sub(hn::Load(kFloats, dscore + n * kLanes), hn::Load(kFloats, delta + n * kLanes));
        gradient[n] = hn::Mul(p[n], difference[n]);
      }
      if (with_roles) {
        if (two_normalisers) {
          Vec first_factor[kVectors];
          factors(score, scale, role_lse, limit, first_factor);
          for (int n = 0; n < kVectors; ++n) {
            first_factor[n] = hn::Mul(first_factor[n], difference[n]);
          }
          add_g(g * kGroup + m, position, first_factor);
        } else {
          add_g(g * kGroup + m, position, gradient);
        }
      }
      if (!key.slots) continue;
      const Slots& slots = *key.slots;
      if (block < slots.first_block[key.slot] || block >= slots.end_block[key.slot]) continue;
      float* to_p = slots.at(slots.p, block, key.slot);
      float* to_ds = slots.at(slots.ds, block, key.slot);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        if (!key.full) {
          const auto unseen = hidden(key, hn::LoadU(kInts, position + n * kLanes));
          p[n] = hn::IfThenZeroElse(unseen, p[n]);
          gradient[n] = hn::Mul(p[n], difference[n]);
        }
        hn::Store(p[n], kFloats, to_p + n * kLanes);
        hn::Store(gradient[n], kFloats, to_ds + n * kLanes);
      }
    }
  }

  // e^min(scale * product - lse, limit), which is at most 1 for visible keys.
  static void factors(const float* product, Vec scale, const float* lse, Vec limit,
                      Vec (&factor)[kVectors]) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const Vec x = hn::MulSub(hn::Load(kFloats, product + n * kLanes), scale,
                               hn::Load(kFloats, lse + n * kLanes));
      factor[n] = exp(hn::Min(limit, x));
    }
  }

  hn::Mask<Floats> hidden(const Key& key, hn::Vec<Ints> position) const {
    return hn::RebindMask(kFloats, hn::Or(hn::Gt(hn::Set(kInts, key.j), position),
                                          hn::Gt(position, hn::Set(kInts, key.last))));
  }

  // `g` of a key and a block of rows goes to the key's sums.
  HWY_INLINE void add_g(int i, const int32_t* position, const Vec (&g)[kVectors]) {
    if (keys_[i].past && !keys_[i].ending) {
      add_to_lanes(g, s_.g_sum + i * kLanes);
    } else {
      add_part_of_g(i, position, g);
    }
  }

  // The same when not all rows count for all sums.
  HWY_NOINLINE void add_part_of_g(int i, const int32_t* position, const Vec (&g)[kVectors]) {
    const Key& key = keys_[i];
    Vec causal[kVectors];
    for (int n = 0; n < kVectors; ++n) {
      const auto before = hn::Gt(hn::Set(kInts, key.j), hn::LoadU(kInts, position + n * kLanes));
      causal[n] = hn::IfThenZeroElse(hn::RebindMask(kFloats, before), g[n]);
    }
    add_to_lanes(causal, s_.g_sum + i * kLanes);
    if (!key.ending) return;
    for (int h = 0; h < p_.horizon_count; ++h) {
      const auto end = hn::Set(kInts, horizon(h, key.j));
      Vec kept[kVectors];
      for (int n = 0; n < kVectors; ++n) {
        const auto after = hn::Gt(hn::LoadU(kInts, position + n * kLanes), end);
        kept[n] = hn::IfThenZeroElse(hn::RebindMask(kFloats, after), causal[n]);
      }
      add_to_lanes(kept, s_.g_partial + (h * Config::kBatch + i) * kLanes);
    }
  }

  static HWY_INLINE void add_to_lanes(const Vec (&x)[kVectors], float* to) {
    Vec sum = x[0];
#pragma GCC unroll 4
    for (int n = 1; n < kVectors; ++n) sum = hn::Add(sum, x[n]);
    hn::Store(hn::Add(hn::Load(kFloats, to), sum), kFloats, to);
  }

  void add_role_sums() {
    const auto total = [](const float* lanes) {
      return hn::GetLane(hn::SumOfLanes(kFloats, hn::Load(kFloats, lanes)));
    };
    for (int i = 0; i < group_count_ * kGroup; ++i) {
      const Key& key = keys_[i];
      if (key.j == kForever) continue;
      const float whole = total(s_.g_sum + i * kLanes);
      for (int h = 0; h < p_.horizon_count; ++h) {
        const int32_t end = horizon(h, key.j);
        if (end < std::max(q0_, key.j)) continue;
        sums_.roles[int64_t{h} * p_.tokens + key.j] +=
            end >= q1_ ? whole : total(s_.g_partial + (h * Config::kBatch + i) * kLanes);
      }
    }
  }

  // dv += P dout, dk += dS q and dq += dS k over the slots in use.
  void work_off(Slots& slots) {
    for (int i = 0; i < slots.count; i += kScalars) {
      add_to_keys(slots, slots.p, i, s_.dout, sums_.dv.get());
      add_to_keys(slots, slots.ds, i, s_.q, sums_.dk.get());
    }
    for (int block = 0; block < plan_.blocks; ++block) {
      for (int c0 = 0; c0 < plan_.head_dim; c0 += kScalars) add_to_dq(slots, block, c0);
    }
    slots.count = 0;
  }

  // The row blocks in which a query sees one of the slots [begin, end).
  struct Blocks {
    int first, end;
  };
  Blocks blocks_of(const Slots& slots, int begin, int end) const {
    return {*std::min_element(slots.first_block + begin, slots.first_block + end),
            *std::max_element(slots.end_block + begin, slots.end_block + end)};
  }

  // to[key] += sum over rows of weight[slot][row] * from[row] for the kScalars slots from `begin`.
  void add_to_keys(const Slots& slots, float* weight, int begin, const float* from, float* to) {
    const int used = std::min(kScalars, slots.count - begin);
    const Blocks blocks = blocks_of(slots, begin, begin + used);
    for (int piece = 0; piece < plan_.pieces; ++piece) {
      // Slots past the last one hold old numbers: summed with the others, but not stored.
      const auto target = [&](int m) {
        const int32_t j = slots.key[begin + std::min(m, used - 1)];
        return to + int64_t{j} * plan_.width() + piece * kBlockRows;
      };
      const float* const rows = from + int64_t{piece} * plan_.rows * kBlockRows;
      const int vectors = (plan_.width() - piece * kBlockRows) / kLanes;
      const float* const w = slots.at(weight, 0, begin);
      if (vectors >= kVectors) {
        add_products<kVectors>(w, blocks, rows, target, used);
      } else if (vectors == 2) {
        add_products<2>(w, blocks, rows, target, used);
      } else {
        add_products<1>(w, blocks, rows, target, used);
      }
    }
  }
  static_assert(kVectors <= 3);

  // The same for kN vectors of one piece of the channels; weights of kScalars slots.
  template <int kN, class Target>
  static void add_products(const float* weight, Blocks blocks, const float* rows,
                           const Target& target, int used) {
    Vec sum[kScalars][kN];
    load_rows(target, sum);
    for (int block = blocks.first; block < blocks.end; ++block) {
      multiply_add<true>(weight + int64_t{block} * Config::kSlots * kBlockRows, kBlockRows,
                         rows + int64_t{block} * kBlockRows * kBlockRows, kBlockRows, kBlockRows,
                         sum);
    }
    store_rows(target, used, sum);
  }

  void add_to_dq(const Slots& slots, int block, int c0) {
    float* dq = s_.dq_columns + (int64_t{block} * plan_.head_dim + c0) * kBlockRows;
    const auto target = [&](int m) { return dq + m * kBlockRows; };
    Vec sum[kScalars][kVectors];
    load_rows(target, sum);
    const auto add = [&](int begin, int end) {
      multiply_add<false>(slots.k + begin * kRowStride + c0, kRowStride,
                          slots.at(slots.ds, block, begin), kBlockRows, end - begin, sum);
    };
    if (&slots == &s_.whole) {
      add(0, slots.count);
    } else {
      for (int begin = 0; begin < slots.count; begin += kGroup) {
        const int end = std::min(begin + kGroup, slots.count);
        const Blocks blocks = blocks_of(slots, begin, end);
        if (block >= blocks.first && block < blocks.end) add(begin, end);
      }
    }
    store_rows(target, kScalars, sum);
  }

  void write_dq() {
    const int d = plan_.head_dim;
    for (int block = 0; block * kBlockRows < row_count(); ++block) {
      transpose(s_.dq_columns + int64_t{block} * d * kBlockRows, kBlockRows, d, kBlockRows,
                s_.row_major, d);
      const int end = std::min(row_count() - block * kBlockRows, kBlockRows);
      for (int i = 0; i < end; ++i) {
        const int r = block * kBlockRows + i;
        write_row(s_.row_major + i * d, d, p_.scale, p_.dq, p_.dtype,
                  row(p_.dq_stride, b_, query_head(r), query(r)));
      }
    }
  }

  const AttentionBackward& p_;
  const Plan& plan_;
  Scratch& s_;
  Sums& sums_;
  const int b_, kv_head_, q0_, q1_;
  const int64_t kv_row_;
  const int32_t* last_;
  int count_ = 0;

  Key keys_[Config::kBatch];
  int first_block_[Config::kBatch / kGroup], end_block_[Config::kBatch / kGroup];
  int group_count_ = 0;
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // NATSLM_KERNELS_CPU_ATTENTION_BACKWARD_TILE_INL_H_
