// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/decode.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <string>

#include "natslm/base/error.h"
#include "natslm/kernels/gpu_head_dim.h"
#include "natslm/ops/parallel.h"
#include "natslm/ops/stream.h"

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

// What q and the rows say, on any device. `queries` is contiguous.
kernels::AttentionDecode describe(const at::Tensor& queries, std::span<const int32_t> row_start,
                                  int32_t kv_heads, double scale, at::Tensor& out,
                                  at::Tensor* lse) {
  kernels::AttentionDecode p;
  p.batch = static_cast<int32_t>(row_start.size()) - 1;
  p.q_heads = static_cast<int32_t>(queries.size(1));
  p.kv_heads = kv_heads;
  p.head_dim = static_cast<int32_t>(queries.size(2));
  p.rows = static_cast<int32_t>(queries.size(0));
  p.scale = static_cast<float>(scale);
  p.dtype = dtype_of(queries.scalar_type());
  p.row_start = row_start.data();
  p.q = queries.const_data_ptr();
  out = at::empty_like(queries);
  p.out = out.mutable_data_ptr();
  if (lse) {
    *lse = at::empty({p.rows, p.q_heads}, queries.options().dtype(at::kFloat));
    p.lse = lse->mutable_data_ptr<float>();
  }
  return p;
}

}  // namespace

at::Tensor attend_pages(const at::Tensor& q, std::span<const int32_t> row_start,
                        std::span<const int32_t> row_position,
                        std::span<const kernels::CachedKeys> keys, int32_t kv_heads, double scale,
                        at::Tensor* lse) {
  NATSLM_CHECK(q.device().is_cpu(), "decode attention: q is on ", q.device().str(),
               ", the lists of keys are on the cpu");
  NATSLM_CHECK(q.dim() == 3 && !row_start.empty() && q.size(0) == std::ssize(row_position) &&
                   std::ssize(keys) == (std::ssize(row_start) - 1) * kv_heads,
               "decode attention: q must be [rows, heads, D] with a position for each row and keys "
               "for each sequence and KV head; got ",
               q.dim(), " axes, ", row_position.size(), " positions, ", keys.size(),
               " lists of keys");
  at::Tensor out;
  const at::Tensor queries = q.contiguous();
  kernels::AttentionDecode p = describe(queries, row_start, kv_heads, scale, out, lse);
  p.row_position = row_position.data();
  p.keys = keys.data();
  if (work_of(p) >= kWorthThreads) p.parallel = torch_threads();
  kernels::cpu::run(p);
  return out;
}

at::Tensor attend_pages(const at::Tensor& q, std::span<const int32_t> row_start,
                        const DeviceLists& lists, int32_t kv_heads, double scale, at::Tensor* lse) {
  NATSLM_CHECK(q.is_cuda(), "decode attention: q is on ", q.device().str(),
               ", the lists of keys are on a GPU");
  NATSLM_CHECK(
      q.dim() == 3 && !row_start.empty() && q.size(0) == row_start.back(),
      "decode attention: q must be [rows, heads, D] with the rows that row_start ends with");
  const c10::DeviceGuard guard(q.device());
  at::Tensor out;
  const at::Tensor queries = gpu_heads(q);
  kernels::AttentionDecode p = describe(queries, row_start, kv_heads, scale, out, lse);
  p.keys = lists.keys;
  p.device_row_start = lists.row_start;
  p.row_position = lists.row_position;
  p.max_count = lists.max_count;
  p.mass = lists.mass;
  const bool hopper = kernels::sm90::why_not(p).empty();
  const size_t bytes =
      hopper ? kernels::sm90::workspace_bytes(p) : kernels::cuda::workspace_bytes(p);
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(bytes)}, queries.options().dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  CUstream_st* stream = current_stream(q.device());
  hopper ? kernels::sm90::run(p, stream) : kernels::cuda::run(p, stream);
  return out.narrow(2, 0, q.size(2)).contiguous();
}

at::Tensor gpu_heads(const at::Tensor& x) {
  const int64_t padding = kernels::gpu_head_dim(static_cast<int32_t>(x.size(2))) - x.size(2);
  return padding > 0 ? at::constant_pad_nd(x, {0, padding}) : x.contiguous();
}

void run_on(const at::Device& device, const kernels::PageUpdate& update) {
  const c10::DeviceGuard guard(device);
  kernels::cuda::run(update, current_stream(device));
}
void run_on(const at::Device& device, const kernels::PageMoves& moves) {
  const c10::DeviceGuard guard(device);
  kernels::cuda::run(moves, current_stream(device));
}
void run_on(const at::Device& device, const kernels::PageGather& gather) {
  const c10::DeviceGuard guard(device);
  kernels::cuda::run(gather, current_stream(device));
}

}  // namespace natslm::ops
