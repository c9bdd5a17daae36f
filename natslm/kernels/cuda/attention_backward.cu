// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/cuda/attention_backward_keys.cuh"
#include "natslm/kernels/cuda/attention_backward_queries.cuh"
#include "natslm/kernels/cuda/column_sums.cuh"
#include "natslm/kernels/cuda/launch.cuh"
#include "natslm/kernels/cuda/row_terms.cuh"

namespace natslm::kernels::cuda {
namespace {

constexpr const char* kName = "attention_backward (cuda)";

int64_t query_rows(const AttentionBackward& p) {
  return int64_t{p.batch} * p.q_heads * p.tokens;
}

int32_t tile_queries(const AttentionBackward& p) {
  int32_t rows = 0;
  with_gpu_head_dim(p.head_dim,
                    [&]<int kHeadDim>() { rows = QueryGradientConfig<kHeadDim>::kRows; });
  return rows / (p.q_heads / p.kv_heads);
}

// The key plan, and behind it the terms of the rows.
struct Workspace {
  size_t safe_lse, delta, safe_role_lse, bytes;
};
Workspace layout(const AttentionBackward& p) {
  const size_t rows = aligned_bytes(query_rows(p) * sizeof(float));
  Workspace w;
  w.safe_lse = aligned_bytes(key_plan_bytes(p, tile_queries(p)));
  w.delta = w.safe_lse + rows;
  w.safe_role_lse = w.delta + rows;
  w.bytes = w.safe_role_lse + (p.role_lse ? rows : 0);
  return w;
}

float factor_limit(const AttentionBackward& p) {
  return p.limit_factor ? 1 : kInfinity;
}

template <int kHeadDim>
int32_t heads_of_a_time(const AttentionBackward& p) {
  const int64_t arrays = 2 * (int64_t{p.q_heads} / p.kv_heads + 1);  // q, dout, k, v
  return heads_together(int64_t{p.batch} * p.kv_heads, arrays * p.tokens * kRowBytes<kHeadDim>);
}

template <int kHeadDim>
void launch_key_gradient(const AttentionBackward& p, const KeySource& keys,
                         const QuerySource& queries, bool with_role_sums, CUstream_st* stream) {
  using Config = KeyGradientConfig<kHeadDim>;
  const int32_t spans = key_span_count(p.tokens, Config::kKeys);
  const KeyGradientArgs args{keys,
                             queries,
                             spans,
                             heads_of_a_time<kHeadDim>(p),
                             p.scale,
                             factor_limit(p),
                             with_role_sums ? p.horizon_count : 0,
                             p.horizons,
                             p.role_sums,
                             static_cast<BFloat16*>(p.dk),
                             static_cast<BFloat16*>(p.dv),
                             p.dk_stride,
                             p.dv_stride};
  launch(kName, key_gradient_kernel<kHeadDim>, int64_t{p.batch} * p.kv_heads * spans,
         Config::kThreads, sizeof(typename Config::Shared), stream, args);
}

template <int kHeadDim>
void launch_role_sums(const AttentionBackward& p, const QuerySource& queries, CUstream_st* stream) {
  using Config = ColumnSumsConfig<kHeadDim>;
  const int32_t spans = key_span_count(p.tokens, Config::kKeys);
  const ColumnSumsArgs args{keys_by_position(p),
                            queries,
                            spans,
                            heads_of_a_time<kHeadDim>(p),
                            p.scale,
                            factor_limit(p),
                            p.horizon_count,
                            p.horizons,
                            p.role_sums};
  launch(kName, column_sums_kernel<kHeadDim, true>, int64_t{p.batch} * p.kv_heads * spans,
         Config::kThreads, sizeof(typename Config::Shared), stream, args);
}

template <int kHeadDim>
void launch_query_gradient(const AttentionBackward& p, const KeyPlan& plan,
                           const QuerySource& queries, CUstream_st* stream) {
  using Config = QueryGradientConfig<kHeadDim>;
  const QueryGradientArgs args{plan, queries, p.scale, static_cast<BFloat16*>(p.dq), p.dq_stride};
  launch(kName, query_gradient_kernel<kHeadDim>, int64_t{p.batch} * p.kv_heads * plan.tiles,
         Config::kThreads, sizeof(typename Config::Shared), stream, args);
}

template <int kHeadDim>
void launch_backward(const AttentionBackward& p, CUstream_st* stream) {
  const KeyPlan plan = prepare_keys(p, tile_queries(p), stream);

  const Workspace at = layout(p);
  const auto view = [&](size_t offset) {
    return reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + offset);
  };
  RowTermsArgs rows{};
  rows.lse = p.lse;
  rows.role_lse = p.role_lse;
  rows.out = static_cast<const BFloat16*>(p.out);
  rows.dout = static_cast<const BFloat16*>(p.dout);
  rows.out_stride = p.out_stride;
  rows.dout_stride = p.dout_stride;
  rows.lengths = p.lengths;
  rows.q_heads = p.q_heads;
  rows.tokens = p.tokens;
  rows.rows = query_rows(p);
  rows.safe_lse = view(at.safe_lse);
  rows.safe_role_lse = p.role_lse ? view(at.safe_role_lse) : nullptr;
  rows.delta = view(at.delta);
  launch_row_terms<kHeadDim>(kName, rows, stream);

  const QuerySource queries{static_cast<const BFloat16*>(p.q),
                            static_cast<const BFloat16*>(p.dout),
                            p.q_stride,
                            p.dout_stride,
                            step_of(p.q_stride),
                            step_of(p.dout_stride),
                            {rows.safe_lse, rows.delta},
                            p.q_heads / p.kv_heads};
  // In position order scores and differences of all pairs are at hand anyway, as long as the role
  // sums have the same normaliser.
  const bool one_pass = !p.sorted.order && !p.role_lse;
  launch_key_gradient<kHeadDim>(p, plan.keys, queries, one_pass, stream);
  if (p.horizon_count > 0 && !one_pass) {
    QuerySource for_roles = queries;
    if (p.role_lse) for_roles.terms.lse = rows.safe_role_lse;
    launch_role_sums<kHeadDim>(p, for_roles, stream);
  }
  launch_query_gradient<kHeadDim>(p, plan, queries, stream);
}

}  // namespace

std::string_view why_not(const AttentionBackward& p) {
  if (const std::string_view common = why_not_common(p); !common.empty()) return common;
  if (const std::string_view horizons = why_not_horizons(p); !horizons.empty()) return horizons;
  if (!rows_are_fit(p.dout, p.dout_stride) || !rows_are_fit(p.dq, p.dq_stride) ||
      !rows_are_fit(p.dk, p.dk_stride) || !rows_are_fit(p.dv, p.dv_stride)) {
    return kRowsUnfit;
  }
  return "";
}

size_t workspace_bytes(const AttentionBackward& p) {
  return layout(p).bytes;
}

void run(const AttentionBackward& p, CUstream_st* stream) {
  check_supported_on_gpu(kName, why_not(p), p);
  if (query_rows(p) == 0) return;
  with_gpu_head_dim(p.head_dim, [&]<int kHeadDim>() { launch_backward<kHeadDim>(p, stream); });
}

}  // namespace natslm::kernels::cuda
