// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/decode.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <string>

#include "natslm/base/error.h"
#include "natslm/ops/parallel.h"

namespace natslm::ops {

DType dtype_of(at::ScalarType type) {
  NATSLM_CHECK(type == at::kFloat || type == at::kBFloat16, "element type ", toString(type),
               " is not supported; use float32 or bfloat16");
  return type == at::kFloat ? DType::kFloat32 : DType::kBFloat16;
}

namespace {

// Multiply-adds below which waking threads costs more than they save (some 20 us of one core).
constexpr int64_t kWorthThreads = 300'000;

int64_t work_of(const kernels::AttentionDecode& p) {
  int64_t pairs = 0;
  for (int32_t list = 0; list < p.batch * p.kv_heads; ++list) {
    const int32_t b = list / p.kv_heads;
    pairs += int64_t{p.row_start[b + 1] - p.row_start[b]} * p.keys[list].count;
  }
  return pairs * (p.q_heads / p.kv_heads) * p.head_dim * 2;
}

}  // namespace

at::Tensor attend_pages(const at::Tensor& q, std::span<const int32_t> row_start,
                        std::span<const int32_t> row_position,
                        std::span<const kernels::CachedKeys> keys, int32_t kv_heads, double scale,
                        at::Tensor* lse) {
  NATSLM_CHECK(q.device().is_cpu(), "decode attention: q is on ", q.device().str(),
               "; this build decodes on the cpu");
  NATSLM_CHECK(q.dim() == 3 && !row_start.empty() && q.size(0) == std::ssize(row_position) &&
                   std::ssize(keys) == (std::ssize(row_start) - 1) * kv_heads,
               "decode attention: q must be [rows, heads, D] with a position for each row and keys "
               "for each sequence and KV head; got ",
               q.dim(), " axes, ", row_position.size(), " positions, ", keys.size(),
               " lists of keys");
  const at::Tensor queries = q.contiguous();
  at::Tensor out = at::empty_like(queries);
  kernels::AttentionDecode p;
  p.batch = static_cast<int32_t>(row_start.size()) - 1;
  p.q_heads = static_cast<int32_t>(queries.size(1));
  p.kv_heads = kv_heads;
  p.head_dim = static_cast<int32_t>(queries.size(2));
  p.rows = static_cast<int32_t>(queries.size(0));
  p.scale = static_cast<float>(scale);
  p.dtype = dtype_of(queries.scalar_type());
  p.row_start = row_start.data();
  p.row_position = row_position.data();
  p.q = queries.const_data_ptr();
  p.keys = keys.data();
  p.out = out.mutable_data_ptr();
  if (lse) {
    *lse = at::empty({p.rows, p.q_heads}, at::kFloat);
    p.lse = lse->mutable_data_ptr<float>();
  }
  if (work_of(p) >= kWorthThreads) p.parallel = torch_threads();
  kernels::cpu::run(p);
  return out;
}

}  // namespace natslm::ops
