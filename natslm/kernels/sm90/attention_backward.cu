// Host side of the Hopper backward kernels: what they take, their working memory, the order of
// launches.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <numbers>

#include "natslm/kernels/checks.h"
#include "natslm/kernels/cuda/key_tiles.h"
#include "natslm/kernels/sm90/attention_backward.h"
#include "natslm/kernels/sm90/hopper.cuh"
#include "natslm/kernels/sm90/host_side.h"
#include "natslm/kernels/sm90/key_tiles.h"

namespace natslm::kernels::sm90 {
namespace {

using cuda::PlanShape;

constexpr const char* kName = "attention_backward (sm90)";

PlanShape plan_of(const AttentionBackward& p) {
  return {p.batch, p.kv_heads, p.tokens, p.head_dim, kQueryGradientRows / group_of(p)};
}

// Counters, the key plan (none for the short path), the terms of the rows.
struct Workspace {
  size_t plan, terms, role_terms, bytes;
};
Workspace layout(const AttentionBackward& p, size_t plan_bytes) {
  const auto aligned = [](size_t bytes) {
    return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  };
  const size_t terms = aligned(static_cast<size_t>(p.batch) * static_cast<size_t>(p.q_heads) *
                               static_cast<size_t>(row_terms_stride(p.tokens)) * sizeof(float));
  Workspace w;
  w.plan = kWorkspaceAlignment;
  w.terms = w.plan + aligned(plan_bytes);
  w.role_terms = w.terms + terms;
  w.bytes = w.role_terms + (p.role_lse ? terms : 0);
  return w;
}
Workspace layout(const AttentionBackward& p) {
  const PlanShape shape = plan_of(p);
  return layout(
      p, p.sorted.order ? cuda::sorted_keys_bytes(shape) : cuda::position_bounds_bytes(shape));
}

// Tiles of queries of one head.
CUtensorMap query_map(const AttentionBackward& p, const void* base, const Strides& stride) {
  return make_tensor_map(base, {{p.head_dim, 1, kSwizzleColumns},
                                {p.tokens, stride.token, kTileQueries},
                                {p.q_heads, stride.head, 1},
                                {p.batch, stride.batch, 1}});
}

KeyParallelArguments key_parallel_arguments(const AttentionBackward& p, const KeysByPlace& keys,
                                            const float* terms, int32_t keys_of_block,
                                            int32_t* next_item) {
  KeyParallelArguments a{};
  a.q = query_map(p, p.q, p.q_stride);
  a.dout = query_map(p, p.dout, p.dout_stride);
  a.k = key_map(p, keys.k, keys.k_stride, kWarpgroupKeys);
  a.v = key_map(p, keys.v, keys.v_stride, kWarpgroupKeys);
  a.terms = terms;
  a.position = keys.position;
  a.last = keys.last;
  a.ends = keys.ends;
  a.lengths = p.lengths;
  a.batch = p.batch;
  a.kv_heads = p.kv_heads;
  a.group = group_of(p);
  a.tokens = p.tokens;
  a.spans = cuda::key_span_count(p.tokens, keys_of_block);
  const int64_t items = int64_t{p.batch} * p.kv_heads * a.spans;
  NATSLM_CHECK(items <= kMaxPosition, kName, ": ", items,
               " spans of keys are more than a 32-bit number holds; use a smaller batch");
  a.items = static_cast<int32_t>(items);
  a.heads_together = heads_together(p, p.q_heads);
  a.next_item = next_item;
  a.scale = p.scale;
  a.scale_log2 = p.scale * std::numbers::log2e_v<float>;
  a.limit = p.limit_factor ? 1 : std::numeric_limits<float>::infinity();
  a.horizons = p.horizons;
  a.role_sums = p.role_sums;
  a.dk = static_cast<__nv_bfloat16*>(p.dk);
  a.dv = static_cast<__nv_bfloat16*>(p.dv);
  a.dk_stride = p.dk_stride;
  a.dv_stride = p.dv_stride;
  return a;
}

// Working memory as the launches see it.
struct Scratch {
  int32_t* counters;
  void* plan;
  float *terms, *role_terms;  // role_terms: null where there is no role_lse
};
Scratch scratch_of(const AttentionBackward& p, const Workspace& at) {
  const auto view = [&](size_t offset) { return static_cast<uint8_t*>(p.workspace) + offset; };
  return {static_cast<int32_t*>(p.workspace), view(at.plan),
          reinterpret_cast<float*>(view(at.terms)),
          p.role_lse ? reinterpret_cast<float*>(view(at.role_terms)) : nullptr};
}

void write_row_terms(const AttentionBackward& p, const Scratch& scratch, bool behind,
                     CUstream_st* stream) {
  launch_row_terms(
      {static_cast<const __nv_bfloat16*>(p.out), static_cast<const __nv_bfloat16*>(p.dout),
       p.out_stride, p.dout_stride, p.lse, p.role_lse, p.lengths, scratch.terms, scratch.role_terms,
       scratch.counters, p.batch, p.q_heads, p.tokens, p.head_dim},
      behind, stream);
}

// dk, dv and the role sums.
template <int kHeadDim>
void launch_key_passes(const AttentionBackward& p, const KeysByPlace& keys, const Scratch& scratch,
                       int processors, CUstream_st* stream) {
  // In position order scores and differences of all pairs are at hand anyway, as long as the role
  // sums have the same normaliser.
  const bool one_pass = brings_role_sums(kHeadDim) && !keys.ends && !p.role_lse;
  KeyParallelArguments gradient =
      key_parallel_arguments(p, keys, scratch.terms, keys_of_key_gradient<kHeadDim>(),
                             scratch.counters + kKeyGradientItems);
  gradient.horizon_count = one_pass ? p.horizon_count : 0;
  launch_key_gradient<kHeadDim>(gradient, processors, stream);

  if (p.horizon_count > 0 && !one_pass) {
    KeyParallelArguments sums = key_parallel_arguments(
        p, keys_by_position(p), scratch.role_terms ? scratch.role_terms : scratch.terms,
        keys_of_role_sums<kHeadDim>(), scratch.counters + kRoleSumItems);
    sums.horizon_count = p.horizon_count;
    launch_role_sums<kHeadDim>(sums, processors, stream);
  }
}

template <int kHeadDim>
void launch_backward(const AttentionBackward& p, CUstream_st* stream) {
  const PlanShape shape = plan_of(p);
  const Scratch scratch = scratch_of(p, layout(p));
  const int processors = multiprocessors();

  QueryGradientArguments queries{};
  const KeysByPlace keys = prepare_keys(p, shape, scratch.plan, queries, stream);
  write_row_terms(p, scratch, true, stream);
  launch_key_passes<kHeadDim>(p, keys, scratch, processors, stream);

  queries.q = group_map(p, p.q, p.q_stride, shape.tile_queries);
  queries.dout = group_map(p, p.dout, p.dout_stride, shape.tile_queries);
  queries.k = key_map(p, keys.k, keys.k_stride, kTileKeys);
  queries.v = key_map(p, keys.v, keys.v_stride, kTileKeys);
  queries.k_piece = key_map(p, keys.k, keys.k_stride, kPieceKeys);
  queries.v_piece = key_map(p, keys.v, keys.v_stride, kPieceKeys);
  queries.terms = scratch.terms;
  queries.lengths = p.lengths;
  queries.next_item = scratch.counters + kQueryGradientItems;
  queries.work_items = static_cast<int32_t>(shape.work_items());
  queries.out = static_cast<__nv_bfloat16*>(p.dq);
  queries.out_stride = p.dq_stride;
  queries.kv_heads = p.kv_heads;
  queries.group = group_of(p);
  queries.tokens = p.tokens;
  queries.tiles = shape.tiles();
  queries.tile_queries = shape.tile_queries;
  queries.scale = p.scale;
  queries.scale_log2 = p.scale * std::numbers::log2e_v<float>;
  launch_query_gradient<kHeadDim>(queries, processors, stream);
}

// No plan: row terms, key passes, query gradient.
template <int kHeadDim>
void launch_short_backward(const AttentionBackward& p, CUstream_st* stream) {
  const Scratch scratch = scratch_of(p, layout(p, 0));
  write_row_terms(p, scratch, false, stream);
  launch_key_passes<kHeadDim>(p, keys_by_position(p), scratch, multiprocessors(), stream);

  ShortQueryGradientArguments queries{short_arguments(p)};
  queries.out = static_cast<__nv_bfloat16*>(p.dq);
  queries.out_stride = p.dq_stride;
  queries.dout = static_cast<const __nv_bfloat16*>(p.dout);
  queries.dout_stride = p.dout_stride;
  queries.terms = scratch.terms;
  launch_short_query_gradient<kHeadDim>(queries, stream);
}

void check_call(const AttentionBackward& p, const char* name, std::string_view why, size_t bytes) {
  NATSLM_CHECK(why.empty(), name, ": ", why, "; got batch ", p.batch, ", q_heads ", p.q_heads,
               ", kv_heads ", p.kv_heads, ", tokens ", p.tokens, ", head_dim ", p.head_dim,
               ", scale ", p.scale, ", horizon_count ", p.horizon_count);
  NATSLM_CHECK(
      p.batch == 0 || p.tokens == 0 ||
          (p.workspace && reinterpret_cast<uintptr_t>(p.workspace) % kWorkspaceAlignment == 0),
      name, ": workspace must be ", bytes, " bytes of device memory, 256-byte aligned");
}

}  // namespace

std::string_view why_not(const AttentionBackward& p) {
  if (const auto why = why_not_shapes(p); !why.empty()) return why;
  if (const auto why = why_not_horizons(p); !why.empty()) return why;
  if (p.dtype != DType::kBFloat16) return "the type must be bfloat16";
  if (p.head_dim != 64 && p.head_dim != 128) return "head_dim must be 64 or 128";
  if (group_of(p) > kMaxGroup) return "at most 8 query heads may share a KV head";
  if (!(p.scale > 0) || !std::isfinite(p.scale)) return "scale must be positive";
  if (!has_aligned_rows(p.q, p.q_stride, p, p.q_heads) ||
      !has_aligned_rows(p.out, p.out_stride, p, p.q_heads) ||
      !has_aligned_rows(p.dout, p.dout_stride, p, p.q_heads) ||
      !has_aligned_rows(p.dq, p.dq_stride, p, p.q_heads) ||
      !has_aligned_rows(p.k, p.k_stride, p, p.kv_heads) ||
      !has_aligned_rows(p.v, p.v_stride, p, p.kv_heads) ||
      !has_aligned_rows(p.dk, p.dk_stride, p, p.kv_heads) ||
      !has_aligned_rows(p.dv, p.dv_stride, p, p.kv_heads)) {
    return "rows must be 16-byte aligned: strides are multiples of 8 elements, and not 0";
  }
  if (plan_of(p).work_items() > std::numeric_limits<int32_t>::max()) {
    return "too many query tiles: batch * kv_heads * tokens is too large";
  }
  if (!is_hopper()) return "the current device is no GPU of compute capability 9.0";
  return "";
}

size_t workspace_bytes(const AttentionBackward& p) {
  return layout(p).bytes;
}

void run(const AttentionBackward& p, CUstream_st* stream) {
  check_call(p, kName, why_not(p), workspace_bytes(p));
  if (p.batch == 0 || p.tokens == 0) return;
  if (p.head_dim == 64) {
    launch_backward<64>(p, stream);
  } else {
    launch_backward<128>(p, stream);
  }
}

}  // namespace natslm::kernels::sm90

namespace natslm::kernels::sm90_short {

std::string_view why_not(const AttentionBackward& p) {
  const std::string_view why = sm90::why_not(p);
  return why.empty() ? sm90::why_not_short(p) : why;
}

size_t workspace_bytes(const AttentionBackward& p) {
  return sm90::layout(p, 0).bytes;
}

void run(const AttentionBackward& p, CUstream_st* stream) {
  sm90::check_call(p, "attention_backward (sm90_short)", why_not(p), workspace_bytes(p));
  if (p.batch == 0 || p.tokens == 0) return;
  if (p.head_dim == 64) {
    sm90::launch_short_backward<64>(p, stream);
  } else {
    sm90::launch_short_backward<128>(p, stream);
  }
}

}  // namespace natslm::kernels::sm90_short
