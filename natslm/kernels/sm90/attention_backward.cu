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

// Counters, the key plan, the terms of the rows.
struct Workspace {
  size_t plan, terms, role_terms, bytes;
};
Workspace layout(const AttentionBackward& p) {
  const auto aligned = [](size_t bytes) {
    return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  };
  const PlanShape shape = plan_of(p);
  const size_t terms = aligned(static_cast<size_t>(p.batch) * static_cast<size_t>(p.q_heads) *
                               static_cast<size_t>(row_terms_stride(p.tokens)) * sizeof(float));
  Workspace w;
  w.plan = kWorkspaceAlignment;
  w.terms = w.plan + aligned(p.sorted.order ? cuda::sorted_keys_bytes(shape)
                                            : cuda::position_bounds_bytes(shape));
  w.role_terms = w.terms + terms;
  w.bytes = w.role_terms + (p.role_lse ? terms : 0);
  return w;
}

// Tiles of queries of one head.
CUtensorMap query_map(const AttentionBackward& p, const void* base, const Strides& stride) {
  return make_tensor_map(base, {{p.head_dim, 1, kSwizzleColumns},
                                {p.tokens, stride.token, kTileQueries},
                                {p.q_heads, stride.head, 1},
                                {p.batch, stride.batch, 1}});
}

// How many heads' blocks start at a time: so many that their queries share the L2 cache.
int32_t heads_together(const AttentionBackward& p) {
  constexpr int64_t kCacheShare = 24 << 20;                                    // of the 50 MB
  const int64_t bytes = 2 * 2 * int64_t{group_of(p)} * p.tokens * p.head_dim;  // q and dout
  const int64_t heads = int64_t{p.batch} * p.kv_heads, together = kCacheShare / bytes;
  return static_cast<int32_t>(together < 1 ? 1 : together > heads ? heads : together);
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
  a.heads_together = heads_together(p);
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

template <int kHeadDim>
void launch_backward(const AttentionBackward& p, CUstream_st* stream) {
  const PlanShape shape = plan_of(p);
  const Workspace at = layout(p);
  const auto view = [&](size_t offset) { return static_cast<uint8_t*>(p.workspace) + offset; };
  const int processors = multiprocessors();

  enum Counter { kKeyGradient, kRoleSums, kQueryGradient, kCounters };
  auto* counters = static_cast<int32_t*>(p.workspace);
  NATSLM_CUDA(cudaMemsetAsync(counters, 0, kCounters * sizeof(*counters), stream));

  auto* terms = reinterpret_cast<float*>(view(at.terms));
  auto* role_terms = p.role_lse ? reinterpret_cast<float*>(view(at.role_terms)) : nullptr;
  launch_row_terms(
      {static_cast<const __nv_bfloat16*>(p.out), static_cast<const __nv_bfloat16*>(p.dout),
       p.out_stride, p.dout_stride, p.lse, p.role_lse, p.lengths, terms, role_terms, p.batch,
       p.q_heads, p.tokens, p.head_dim},
      stream);

  QueryGradientArguments queries{};
  const KeysByPlace keys = prepare_keys(p, shape, view(at.plan), queries, stream);

  // In position order scores and differences of all pairs are at hand anyway, as long as the role
  // sums have the same normaliser.
  const bool one_pass = brings_role_sums(kHeadDim) && !p.sorted.order && !p.role_lse;
  KeyParallelArguments gradient = key_parallel_arguments(
      p, keys, terms, keys_of_key_gradient<kHeadDim>(), counters + kKeyGradient);
  gradient.horizon_count = one_pass ? p.horizon_count : 0;
  launch_key_gradient<kHeadDim>(gradient, processors, stream);

  if (p.horizon_count > 0 && !one_pass) {
    KeyParallelArguments sums =
        key_parallel_arguments(p, keys_by_position(p), role_terms ? role_terms : terms,
                               keys_of_role_sums<kHeadDim>(), counters + kRoleSums);
    sums.horizon_count = p.horizon_count;
    launch_role_sums<kHeadDim>(sums, processors, stream);
  }

  queries.q = group_map(p, p.q, p.q_stride, shape.tile_queries);
  queries.dout = group_map(p, p.dout, p.dout_stride, shape.tile_queries);
  queries.k = key_map(p, keys.k, keys.k_stride, kTileKeys);
  queries.v = key_map(p, keys.v, keys.v_stride, kTileKeys);
  queries.k_piece = key_map(p, keys.k, keys.k_stride, kPieceKeys);
  queries.v_piece = key_map(p, keys.v, keys.v_stride, kPieceKeys);
  queries.terms = terms;
  queries.lengths = p.lengths;
  queries.next_item = counters + kQueryGradient;
  queries.work_items = static_cast<int32_t>(shape.work_items());
  queries.out = static_cast<__nv_bfloat16*>(p.dq);
  queries.out_stride = p.dq_stride;
  queries.kv_heads = p.kv_heads;
  queries.group = group_of(p);
  queries.tokens = p.tokens;
  queries.tiles = shape.tiles();
  queries.tile_queries = shape.tile_queries;
  queries.scale = p.scale;
  queries.scale_log2 = gradient.scale_log2;
  launch_query_gradient<kHeadDim>(queries, processors, stream);
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
  const std::string_view why = why_not(p);
  NATSLM_CHECK(why.empty(), kName, ": ", why, "; got batch ", p.batch, ", q_heads ", p.q_heads,
               ", kv_heads ", p.kv_heads, ", tokens ", p.tokens, ", head_dim ", p.head_dim,
               ", scale ", p.scale, ", horizon_count ", p.horizon_count);
  if (p.batch == 0 || p.tokens == 0) return;
  NATSLM_CHECK(p.workspace && reinterpret_cast<uintptr_t>(p.workspace) % kWorkspaceAlignment == 0,
               kName, ": workspace must be ", workspace_bytes(p),
               " bytes of device memory, 256-byte aligned");
  if (p.head_dim == 64) {
    launch_backward<64>(p, stream);
  } else {
    launch_backward<128>(p, stream);
  }
}

}  // namespace natslm::kernels::sm90
