// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/attention_forward.cuh"
#include "natslm/kernels/cuda/column_sums.cuh"
#include "natslm/kernels/cuda/launch.cuh"
#include "natslm/kernels/cuda/row_terms.cuh"

namespace natslm::kernels::cuda {
namespace {

constexpr const char* kName = "attention_forward (cuda)";

int64_t query_rows(const AttentionForward& p) {
  return int64_t{p.batch} * p.q_heads * p.tokens;
}

int32_t tile_queries(const AttentionForward& p) {
  int32_t rows = 0;
  with_gpu_head_dim(p.head_dim, [&]<int kHeadDim>() { rows = ForwardConfig<kHeadDim>::kRows; });
  return rows / (p.q_heads / p.kv_heads);
}

template <int kHeadDim>
void launch_forward(const AttentionForward& p, const KeyPlan& plan, CUstream_st* stream) {
  using Config = ForwardConfig<kHeadDim>;
  const ForwardArgs args{plan,
                         p.q_heads / p.kv_heads,
                         p.scale,
                         static_cast<const BFloat16*>(p.q),
                         static_cast<BFloat16*>(p.out),
                         p.q_stride,
                         p.out_stride,
                         p.lse};
  launch(kName, forward_kernel<kHeadDim>, int64_t{p.batch} * p.kv_heads * plan.tiles,
         Config::kThreads, sizeof(typename Config::Shared), stream, args);
}

// Replays the scores with the log-sum-exp that the forward pass has written.
template <int kHeadDim>
void launch_mass(const AttentionForward& p, const KeySource& keys, float* safe_lse,
                 CUstream_st* stream) {
  using Config = ColumnSumsConfig<kHeadDim>;
  RowTermsArgs rows{};
  rows.lse = p.lse;
  rows.lengths = p.lengths;
  rows.q_heads = p.q_heads;
  rows.tokens = p.tokens;
  rows.rows = query_rows(p);
  rows.safe_lse = safe_lse;
  launch_row_terms<kHeadDim>(kName, rows, stream);

  const int32_t group = p.q_heads / p.kv_heads;
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  ColumnSumsArgs args{};
  args.keys = keys;
  args.queries.q = static_cast<const BFloat16*>(p.q);
  args.queries.q_stride = p.q_stride;
  args.queries.q_step = step_of(p.q_stride);
  args.queries.terms.lse = safe_lse;
  args.queries.group = group;
  args.spans = key_span_count(p.tokens, Config::kKeys);
  args.heads_together = heads_together(heads, int64_t{group + 1} * p.tokens * kRowBytes<kHeadDim>);
  args.scale = p.scale;
  args.limit = kInfinity;
  args.horizon_count = 1;
  args.horizons = p.last;
  args.sums = p.mass;
  launch(kName, column_sums_kernel<kHeadDim, false>, heads * args.spans, Config::kThreads,
         sizeof(typename Config::Shared), stream, args);
}

}  // namespace

std::string_view why_not(const AttentionForward& p) {
  return why_not_common(p);
}

size_t workspace_bytes(const AttentionForward& p) {
  const size_t plan = aligned_bytes(key_plan_bytes(p, tile_queries(p)));
  return plan + (p.mass ? query_rows(p) * sizeof(float) : 0);
}

void run(const AttentionForward& p, CUstream_st* stream) {
  check_supported_on_gpu(kName, why_not(p), p);
  if (query_rows(p) == 0) return;
  const KeyPlan plan = prepare_keys(p, tile_queries(p), stream);
  with_gpu_head_dim(p.head_dim, [&]<int kHeadDim>() {
    launch_forward<kHeadDim>(p, plan, stream);
    if (!p.mass) return;
    const size_t safe_lse = aligned_bytes(key_plan_bytes(p, tile_queries(p)));
    launch_mass<kHeadDim>(p, plan.keys,
                          reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + safe_lse),
                          stream);
  });
}

}  // namespace natslm::kernels::cuda
