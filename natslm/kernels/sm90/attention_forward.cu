// Host side of the Hopper forward kernel: what it takes, its working memory, the order of launches.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <numbers>

#include "natslm/kernels/checks.h"
#include "natslm/kernels/sm90/attention_forward.h"
#include "natslm/kernels/sm90/attention_whole.h"
#include "natslm/kernels/sm90/host_side.h"
#include "natslm/kernels/sm90/key_tiles.h"

namespace natslm::kernels::sm90 {
namespace {

using cuda::PlanShape;

PlanShape plan_of(const AttentionForward& p) {
  return {p.batch, p.kv_heads, p.tokens, p.head_dim, forward_rows(p.head_dim) / group_of(p)};
}

void check_call(const AttentionForward& p, const char* name, std::string_view why) {
  NATSLM_CHECK(why.empty(), name, ": ", why, "; got batch ", p.batch, ", q_heads ", p.q_heads,
               ", kv_heads ", p.kv_heads, ", tokens ", p.tokens, ", head_dim ", p.head_dim,
               ", scale ", p.scale);
}

void launch_mass(const AttentionForward& p, const KeysByPlace& keys, CUstream_st* stream) {
  launch_attention_mass(
      {static_cast<const __nv_bfloat16*>(p.q), static_cast<const __nv_bfloat16*>(keys.k),
       p.q_stride, keys.k_stride, keys.position, keys.last, p.lengths, p.lse, p.mass, p.batch,
       p.kv_heads, group_of(p), p.tokens, p.head_dim, p.scale * std::numbers::log2e_v<float>},
      stream);
}

// All of `a` but the plan. tile_keys: rows of a box of k and v.
void describe_call(const AttentionForward& p, const PlanShape& shape, const KeysByPlace& keys,
                   int32_t tile_keys, ForwardArguments& a) {
  a.q = group_map(p, p.q, p.q_stride, shape.tile_queries);
  a.k = key_map(p, keys.k, keys.k_stride, tile_keys);
  a.v = key_map(p, keys.v, keys.v_stride, tile_keys);
  a.k_piece = key_map(p, keys.k, keys.k_stride, kPieceKeys);
  a.v_piece = key_map(p, keys.v, keys.v_stride, kPieceKeys);
  a.lengths = p.lengths;
  a.work_items = static_cast<int32_t>(shape.work_items());
  a.out = static_cast<__nv_bfloat16*>(p.out);
  a.lse = p.lse;
  a.out_stride = p.out_stride;
  a.kv_heads = p.kv_heads;
  a.group = group_of(p);
  a.tokens = p.tokens;
  a.tiles = shape.tiles();
  a.tile_queries = shape.tile_queries;
  a.scale = p.scale;
  a.scale_log2 = p.scale * std::numbers::log2e_v<float>;
}

void run_whole(const AttentionForward& p, CUstream_st* stream) {
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  const WholeCut cut =
      whole_cut(p.head_dim, heads, int64_t{p.tokens} * group_of(p), multiprocessors());
  const PlanShape shape = {p.batch, p.kv_heads, p.tokens, p.head_dim, cut.rows / group_of(p)};
  WholeArguments a{};
  const KeysByPlace keys = keys_by_position(p);
  describe_call(p, shape, keys, kWholeKeys, a);
  a.last = p.last;
  a.heads = static_cast<int32_t>(heads);
  a.heads_together = heads_together(p, p.kv_heads);
  const auto launch = [&] {
    if (p.head_dim == 64) {
      return cut.rows == 128  ? launch_attention_whole<64, 128, 1>
             : cut.parts == 2 ? launch_attention_whole<64, 64, 2>
                              : launch_attention_whole<64, 64, 4>;
    }
    return cut.rows == 192   ? launch_attention_whole<128, 192, 1>
           : cut.rows == 128 ? launch_attention_whole<128, 128, 1>
                             : launch_attention_whole<128, 64, 2>;
  }();
  launch(a, multiprocessors(), stream);
  if (p.mass) launch_mass(p, keys, stream);
}

}  // namespace

std::string_view why_not(const AttentionForward& p) {
  if (const auto why = why_not_shapes(p); !why.empty()) return why;
  if (p.dtype != DType::kBFloat16) return "the type must be bfloat16";
  if (p.head_dim != 64 && p.head_dim != 128) return "head_dim must be 64 or 128";
  if (group_of(p) > kMaxGroup) return "at most 8 query heads may share a KV head";
  if (!(p.scale > 0) || !std::isfinite(p.scale)) return "scale must be positive";
  if (!has_aligned_rows(p.q, p.q_stride, p, p.q_heads) ||
      !has_aligned_rows(p.k, p.k_stride, p, p.kv_heads) ||
      !has_aligned_rows(p.v, p.v_stride, p, p.kv_heads) ||
      !has_aligned_rows(p.out, p.out_stride, p, p.q_heads)) {
    return "rows must be 16-byte aligned: strides are multiples of 8 elements, and not 0";
  }
  if (plan_of(p).work_items() > std::numeric_limits<int32_t>::max()) {
    return "too many query tiles: batch * kv_heads * tokens is too large";
  }
  if (!is_hopper()) return "the current device is no GPU of compute capability 9.0";
  return "";
}

size_t workspace_bytes(const AttentionForward& p) {
  const PlanShape shape = plan_of(p);
  return p.sorted.order ? cuda::sorted_keys_bytes(shape) : cuda::position_bounds_bytes(shape);
}

void run(const AttentionForward& p, CUstream_st* stream) {
  check_call(p, "attention_forward (sm90)", why_not(p));
  if (p.batch == 0 || p.tokens == 0) return;
  NATSLM_CHECK(p.workspace && reinterpret_cast<uintptr_t>(p.workspace) % kWorkspaceAlignment == 0,
               "attention_forward (sm90): workspace must be ", workspace_bytes(p),
               " bytes of device memory, 256-byte aligned");

  const PlanShape shape = plan_of(p);
  ForwardArguments a{};
  const KeysByPlace keys = prepare_keys(p, shape, p.workspace, a, stream);
  describe_call(p, shape, keys, kTileKeys, a);
  if (p.head_dim == 64) {
    launch_attention_forward<64>(a, multiprocessors(), stream);
  } else {
    launch_attention_forward<128>(a, multiprocessors(), stream);
  }

  if (p.mass) launch_mass(p, keys, stream);
}

}  // namespace natslm::kernels::sm90

namespace natslm::kernels {

std::string_view sm90_short::why_not(const AttentionForward& p) {
  const std::string_view why = sm90::why_not(p);
  return why.empty() ? sm90::why_not_short(p) : why;
}

size_t sm90_short::workspace_bytes(const AttentionForward&) {
  return 0;
}

void sm90_short::run(const AttentionForward& p, CUstream_st* stream) {
  sm90::check_call(p, "attention_forward (sm90_short)", why_not(p));
  if (p.batch == 0 || p.tokens == 0) return;
  sm90::ShortForwardArguments a{sm90::short_arguments(p)};
  a.out = static_cast<__nv_bfloat16*>(p.out);
  a.out_stride = p.out_stride;
  a.lse = p.lse;
  if (p.head_dim == 64) {
    sm90::launch_short_forward<64>(a, stream);
  } else {
    sm90::launch_short_forward<128>(a, stream);
  }
  if (p.mass) sm90::launch_mass(p, sm90::keys_by_position(p), stream);
}

std::string_view sm90_whole::why_not(const AttentionForward& p) {
  return sm90::why_not(p);
}

size_t sm90_whole::workspace_bytes(const AttentionForward&) {
  return 0;
}

void sm90_whole::run(const AttentionForward& p, CUstream_st* stream) {
  sm90::check_call(p, "attention_forward (sm90_whole)", why_not(p));
  if (p.batch == 0 || p.tokens == 0) return;
  sm90::run_whole(p, stream);
}

}  // namespace natslm::kernels
