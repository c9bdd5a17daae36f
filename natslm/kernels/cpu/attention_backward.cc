// Attention backward for CPUs: two products over the pairs that the role sums need, the other three
// only over gathered keys (attention_backward_tile-inl.h).
//
// Tiles are dealt out to a fixed number of parts, each with sums of its own that are added in
// order: the result does not depend on the number of workers.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_backward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "natslm/kernels/cpu/attention_backward.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/cpu/attention_backward_memory-inl.h"
#include "natslm/kernels/cpu/attention_backward_tile-inl.h"
#include "natslm/kernels/cpu/live_keys.h"
#include "natslm/kernels/cpu/scratch_memory.h"
#include "natslm/kernels/cpu/tile_math-inl.h"
#include "natslm/kernels/element.h"

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

// Adds up the parts of the keys [begin, end) of one KV head and writes dk, dv and the role sums.
void write_keys(const AttentionBackward& p, const Plan& plan, int head, int begin, int end,
                const std::unique_ptr<Sums>* parts, int part_count) {
  const int b = head / p.kv_heads, kv_head = head % p.kv_heads, width = plan.width();
  const auto total = scratch_memory(width);
  const auto write = [&](const auto& sums_of, int t, float factor, void* to,
                         const Strides& stride) {
    fill(total.get(), width, 0);
    for (int part = 0; part < part_count; ++part) {
      if (!parts[part]->in_use[t]) continue;
      const float* sums = sums_of(*parts[part]) + int64_t{t} * width;
      for (int c = 0; c < width; c += kLanes) {
        const Vec sum = hn::Load(kFloats, total.get() + c);
        hn::Store(hn::Add(sum, hn::Load(kFloats, sums + c)), kFloats, total.get() + c);
      }
    }
    write_row(total.get(), plan.head_dim, factor, to, p.dtype, row(stride, b, kv_head, t));
  };
  for (int t = begin; t < end; ++t) {
    write([](const Sums& s) { return s.dk.get(); }, t, p.scale, p.dk, p.dk_stride);
    write([](const Sums& s) { return s.dv.get(); }, t, 1.0f, p.dv, p.dv_stride);
  }
  for (int h = 0; h < p.horizon_count; ++h) {
    float* to = p.role_sums + (int64_t{h} * p.batch * p.kv_heads + head) * p.tokens;
    for (int t = begin; t < end; ++t) {
      to[t] = 0;
      for (int part = 0; part < part_count; ++part) {
        to[t] += parts[part]->roles[int64_t{h} * p.tokens + t];
      }
    }
  }
}

// Enough tasks for any small number of workers, and an even number of them for an odd number of
// heads (15 equal tasks keep two workers busy for the time of 16), unless their sums would take too
// much memory.
int part_count_of(const AttentionBackward& p, const Plan& plan) {
  const int64_t heads = std::max(p.batch * p.kv_heads, 1);
  const int64_t tiles = std::max((p.tokens + plan.tile - 1) / plan.tile, 1);
  const int64_t bytes = std::max<int64_t>(2 * sizeof(float) * p.tokens * plan.width() * heads, 1);
  const int64_t affordable = Config::kMostSumBytes / bytes;
  const int64_t wanted =
      heads < Config::kTasks ? std::max<int64_t>(Config::kTasks / heads / 2 * 2, 2) : 1;
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, affordable), 1, tiles));
}

void run_vectors(const AttentionBackward& p) {
  NATSLM_ASSERT(hn::Lanes(kFloats) == kLanes);
  const Plan plan(p);
  const int heads = p.batch * p.kv_heads, parts = part_count_of(p, plan);
  std::vector<LiveKeys> live;
  for (int head = 0; head < heads; ++head) {
    live.emplace_back(p.last + int64_t{head} * p.tokens,
                      length_of(p.lengths, head / p.kv_heads, p.tokens));
  }
  std::vector<std::unique_ptr<Scratch>> scratch(p.parallel.workers);
  // One part a head: its sums are written at once, so a worker can use the same memory again.
  std::vector<std::unique_ptr<Sums>> sums(parts == 1 ? p.parallel.workers : heads * parts);
  p.parallel(int64_t{heads} * parts, [&](int64_t task, int worker) {
    const int head = static_cast<int>(task / parts), part = static_cast<int>(task % parts);
    const int b = head / p.kv_heads, length = length_of(p.lengths, b, p.tokens);
    if (!scratch[worker]) scratch[worker] = std::make_unique<Scratch>(plan, p.tokens);
    std::unique_ptr<Sums>& sum = sums[parts == 1 ? worker : task];
    if (!sum) sum = std::make_unique<Sums>(plan, p.horizon_count, p.tokens);
    sum->clear();
    // Later tiles walk over more keys: dealt out to and fro, every part gets as much of them.
    for (int round = 0; round * parts * plan.tile < length; ++round) {
      const int t = round * parts + (round % 2 == 0 ? part : parts - 1 - part);
      if (t * plan.tile >= length) continue;
      Tile(p, plan, *scratch[worker], *sum, b, head % p.kv_heads, live[head], t).run();
    }
    if (parts == 1) write_keys(p, plan, head, 0, length, &sum, 1);
  });
  if (parts == 1) return;
  p.parallel(int64_t{heads} * parts, [&](int64_t task, int) {
    const int head = static_cast<int>(task / parts), part = static_cast<int>(task % parts);
    const int64_t length = length_of(p.lengths, head / p.kv_heads, p.tokens);
    write_keys(p, plan, head, static_cast<int>(length * part / parts),
               static_cast<int>(length * (part + 1) / parts), &sums[int64_t{head} * parts], parts);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace natslm::kernels::cpu {
namespace {

HWY_EXPORT(run_vectors);

void clear_padding(const AttentionBackward& p) {
  // All bits 0 is the number 0 in both types.
  const auto clear = [&](void* array, const Strides& stride, int b, int heads) {
    for (int h = 0; h < heads; ++h) {
      for (int t = length_of(p.lengths, b, p.tokens); t < p.tokens; ++t) {
        std::memset(static_cast<char*>(array) + row(stride, b, h, t) * size_of(p.dtype), 0,
                    p.head_dim * size_of(p.dtype));
      }
    }
  };
  for (int b = 0; b < p.batch; ++b) {
    clear(p.dq, p.dq_stride, b, p.q_heads);
    clear(p.dk, p.dk_stride, b, p.kv_heads);
    clear(p.dv, p.dv_stride, b, p.kv_heads);
    const int length = length_of(p.lengths, b, p.tokens);
    for (int row = 0; row < p.horizon_count * p.kv_heads; ++row) {
      const int64_t at = (int64_t{row / p.kv_heads} * p.batch + b) * p.kv_heads + row % p.kv_heads;
      std::fill_n(p.role_sums + at * p.tokens + length, p.tokens - length, 0.0f);
    }
  }
}

}  // namespace

std::string_view why_not(const AttentionBackward& p) {
  std::string_view reason = why_not_shapes(p);
  if (reason.empty()) reason = why_not_cpu_head_dim(p.head_dim);
  return reason.empty() ? why_not_horizons(p) : reason;
}

void run(const AttentionBackward& p) {
  check_supported("attention_backward (cpu)", why_not(p), p);
  clear_padding(p);
  HWY_DYNAMIC_DISPATCH(run_vectors)(p);
}

}  // namespace natslm::kernels::cpu
#endif  // HWY_ONCE
