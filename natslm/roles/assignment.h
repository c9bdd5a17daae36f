// One pass from the score layer's logits to everything a training step needs of the roles: noise,
// role, one-hot, lifetimes, horizons, price; and the pass back. Torch-free: raw pointers in, the
// differentiable tensor form is assign_roles.h.
//
// Straight-through Gumbel-softmax at temperature 1 (Jang et al. 2017): the one-hot of
// argmax(logits + noise) goes forward, the gradient of softmax(logits + noise) back. Token 0 (the
// first chunk) is Global and has no gradient. With chunks the logits of a chunk are the means of
// its tokens' logits, which, the layer being linear, is the layer applied to the mean-pooled input.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "natslm/base/dtype.h"
#include "natslm/base/parallel.h"
#include "natslm/roles/roles.h"

struct CUstream_st;

namespace natslm::roles {

// Columns of Assignment::shares.
enum Share : int { kPairs, kKvEnd, kKvMean, kArgmaxKvEnd };
inline constexpr int kShares = 4;

struct Assignment {
  int32_t batch = 0, kv_heads = 0, tokens = 0;  // B, Hkv, T
  Options options;                              // a set other than dense

  const void* logits = nullptr;          // [B, T, kRoles * Hkv], last axis contiguous
  DType logits_dtype = DType::kFloat32;  // widened, so that both types give the same roles
  int64_t logits_batch_stride = 0, logits_token_stride = 0;
  const int32_t* lengths = nullptr;  // [B] or null: all T
  const float* bias = nullptr;       // [B] added to the Sliding logits, or null: 0

  bool sample = false;  // false: argmax, no noise
  uint64_t seed = 0;
  int64_t step = 0;
  int32_t layer = 0;
  int32_t first_head = 0;              // index of head 0 here in the whole model's layer
  const int64_t* sequences = nullptr;  // [B] ids of the texts, or null: 0 .. B - 1

  int8_t* roles = nullptr;      // [B, Hkv, T]; Global where no role was given
  int32_t* last = nullptr;      // [B, Hkv, T]; -1 past a length, as the horizons
  int32_t* horizons = nullptr;  // [kRoles, B, Hkv, T]
  float* onehot = nullptr;      // [B, Hkv, T, kRoles]; 0 past a length
  float* soft = nullptr;        // [B, Hkv, T / c, kRoles] softmax(logits + noise); 0 for
                                // chunks without a gradient. Written only if sampling
  float* shares = nullptr;      // [B, Hkv, kShares]; 1 where the length is 0

  // The keys in kernels::KeyOrder (attention_forward.h) of key_reach(options); null `ends`: not
  // wanted.
  int32_t* order = nullptr;  // [B, Hkv, T]; not written past a length
  int32_t* ends = nullptr;   // [B, Hkv, KeyOrder::kSegments]

  ParallelFor parallel;  // CPU

  // GPU: all pointers are to device memory, and nothing waits for the device.
  const int64_t* device_step = nullptr;  // read instead of `step`, each time the kernels run: a
                                         // replayed graph draws the noise of the current step
  void* workspace = nullptr;             // cuda::workspace_bytes(p) bytes, 256-byte aligned
};

// The result does not depend on the number of workers.
void assign(const Assignment&);

struct AssignmentGradient {
  int32_t batch = 0, kv_heads = 0, tokens = 0;
  int32_t chunk = 1;
  const int32_t* lengths = nullptr;   // as in the pass forward
  const int32_t* horizons = nullptr;  // [kRoles, B, Hkv, T] as written by it
  const float* soft = nullptr;        // [B, Hkv, T / c, kRoles] likewise

  const float* donehot = nullptr;  // [B, Hkv, T, kRoles] with the strides below, or null: 0
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0, role_stride = 0;
  double dprice = 0;  // gradient of the mean of shares[..., kPairs] over B and Hkv
  const float* device_dprice = nullptr;  // GPU: in device memory, instead of dprice; null: dprice

  float* dlogits = nullptr;  // [B, T, kRoles * Hkv] contiguous
  ParallelFor parallel;
};

void assign_backward(const AssignmentGradient&);

// The same on a GPU of compute capability 8.0 and up: roles, lifetimes, horizons, one-hots, order,
// pairs and KV at end bit for bit those of the CPU from the same logits; `soft`, `kv_mean` and the
// gradient within rounding. Two runs agree bit for bit. Lengths outside 0..T count as the nearest
// of the two. A build without CUDA has these too; why_not says so.
namespace cuda {
std::string_view why_not(const Assignment&);  // "" means supported
size_t workspace_bytes(const Assignment&);
void assign(const Assignment&, CUstream_st* stream);
void assign_backward(const AssignmentGradient&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::roles
