// Which GPU path serves an attention problem best: the one place where measured crossovers stand.
// `nats-lm info` prints the table, `nats-lm bench attention --device cuda --crossover` measures
// one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"

namespace natslm::kernels {

enum class Pass : uint8_t { kForward, kBackward };
std::string_view name(Pass pass);  // "forward", "backward"

// A backend of attention_forward.h and the order in which it reads the keys; or kLibrary, the dense
// kernels of LibTorch (cuDNN, FlashAttention), which know no lifetimes: where every key is visible.
// Those run in ops/ (library_attention.h); here they only have a name and places in the table.
enum class AttentionPath : uint8_t {
  kCudaPosition,
  kCudaSorted,
  kSm90Position,
  kSm90Sorted,
  kSm90Short,
  kSm90Whole,
  kLibrary
};
inline constexpr AttentionPath kAttentionPaths[] = {
    AttentionPath::kCudaPosition, AttentionPath::kCudaSorted, AttentionPath::kSm90Position,
    AttentionPath::kSm90Sorted,   AttentionPath::kSm90Short,  AttentionPath::kSm90Whole,
    AttentionPath::kLibrary};
std::string_view name(AttentionPath path);                      // "cuda-position", ...
std::optional<AttentionPath> attention_path(std::string_view);  // from its name

constexpr bool is_sorted(AttentionPath path) {
  return path == AttentionPath::kCudaSorted || path == AttentionPath::kSm90Sorted;
}
constexpr bool is_sm90(AttentionPath path) {
  return path == AttentionPath::kSm90Position || path == AttentionPath::kSm90Sorted ||
         path == AttentionPath::kSm90Short || path == AttentionPath::kSm90Whole;
}

inline constexpr int32_t kAnyGroup = INT32_MAX;

struct Crossover {
  Pass pass;
  int32_t head_dim;     // 0: any
  int32_t most_group;   // query heads of a KV head, at most; kAnyGroup
  double most_density;  // visible / causal pairs, at most
  int32_t from_tokens;  // T, at least
  AttentionPath path;
  bool every_key = false;  // only where every key is known to be visible to every later query
  int64_t from_rows = 0;   // B * Hq * T, at least: whether the device is busy or waits
};
// A later row beats an earlier one. The first row of a pass takes everything.
std::span<const Crossover> crossovers();

struct AttentionShape {
  Pass pass = Pass::kForward;
  int32_t head_dim = 0, group = 1, tokens = 0;
  double density = 1;      // expected; a wrong guess costs time only
  bool every_key = false;  // known, and then density is 1: a wrong claim gives wrong results
  int64_t rows = 0;        // B * Hq * T
};

// Of parameters: AttentionShape::rows.
template <class Params>
constexpr int64_t rows_of(const Params& p) {
  return int64_t{p.batch} * p.q_heads * p.tokens;
}

constexpr bool covers(const Crossover& row, const AttentionShape& shape) {
  return row.pass == shape.pass && (row.head_dim == 0 || row.head_dim == shape.head_dim) &&
         shape.group <= row.most_group && shape.density <= row.most_density &&
         shape.tokens >= row.from_tokens && shape.rows >= row.from_rows &&
         (shape.every_key || !row.every_key);
}

// The path of the last row that covers the shape and is usable(path); nothing if none is.
template <class Usable>
std::optional<AttentionPath> choose_path(const AttentionShape& shape, Usable&& usable) {
  const std::span<const Crossover> rows = crossovers();
  for (auto row = rows.rbegin(); row != rows.rend(); ++row) {
    if (covers(*row, shape) && usable(row->path)) return row->path;
  }
  return std::nullopt;
}

// Whether LibTorch's dense kernels serve a problem of this shape (its pass is ignored) best in
// which every key is visible. With a gradient one kernel must do both passes, since each keeps what
// it needs for the way back, and the longer one decides: backward.
template <class Usable>
bool takes_library(AttentionShape shape, bool with_gradient, Usable&& usable) {
  shape.every_key = true;
  shape.density = 1;
  shape.pass = with_gradient ? Pass::kBackward : Pass::kForward;
  return choose_path(shape, usable) == AttentionPath::kLibrary;
}

// Parameters of a shape without any memory, bfloat16, tokens one after the other: what why_not,
// choose_path and workspace_bytes look at. With an order of the keys if `ordered`.
template <class Params>
Params shape_only(int32_t batch, int32_t q_heads, int32_t kv_heads, int32_t tokens,
                  int32_t head_dim, bool ordered) {
  static constexpr int32_t kSomewhere = 0;
  Params p;
  p.batch = batch;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.tokens = tokens;
  p.head_dim = head_dim;
  p.dtype = DType::kBFloat16;
  p.q_stride = p.k_stride = p.v_stride = p.out_stride = {head_dim, head_dim, head_dim};
  if constexpr (std::is_same_v<Params, AttentionBackward>) {
    p.dout_stride = p.dq_stride = p.dk_stride = p.dv_stride = p.q_stride;
  }
  if (ordered) p.sorted.order = p.sorted.ends = &kSomewhere;
  return p;
}

// "" if this path can run these parameters here (build, device, shape, an order if it sorts).
std::string why_not(const AttentionForward& params, AttentionPath path);
std::string why_not(const AttentionBackward& params, AttentionPath path);
// By the table, never kLibrary; nothing if no path can run them.
std::optional<AttentionPath> choose_path(const AttentionForward& params, double density);
std::optional<AttentionPath> choose_path(const AttentionBackward& params, double density);
// As the backends' own; a path in position order leaves params.sorted alone.
size_t workspace_bytes(const AttentionForward& params, AttentionPath path);
size_t workspace_bytes(const AttentionBackward& params, AttentionPath path);
void run(const AttentionForward& params, AttentionPath path, CUstream_st* stream);
void run(const AttentionBackward& params, AttentionPath path, CUstream_st* stream);

}  // namespace natslm::kernels
