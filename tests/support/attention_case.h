// Attention problems for tests: shapes, lifetimes and numbers drawn from a seed, in memory that
// punishes wrong reads (padding holds NaN) and wrong writes (outputs start as NaN, guards between
// rows are checked).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"

namespace natslm::test {

// How the keys of a case live.
enum class Lifetimes {
  kRoles,        // Global, Local and Sliding at random: what training draws
  kAnything,     // any integer, also below the key's own position
  kForever,      // every key Global
  kLocal,        // every key but the first Local: all stay alive while no Global follows
  kSliding,      // every key j readable up to j + window
  kOnlySelf,     // last[j] = j
  kNever,        // last[j] = j - 1: no query sees any key
  kAllDieAtOnce  // last = the middle of the text for every key
};

struct AttentionCase {
  std::string name;
  uint64_t seed = 1;
  int batch = 1, q_heads = 1, kv_heads = 1, tokens = 1, head_dim = 8;
  DType dtype = DType::kFloat32;
  Lifetimes lifetimes = Lifetimes::kRoles;
  int window = 4;
  double global_share = 0.2, local_share = 0.2;
  bool ragged = false;       // lengths below tokens (null lengths otherwise)
  bool token_major = false;  // memory [B, T, H, D + guard] instead of [B, H, T, D]
  double size = 1.0;         // standard deviation of the scores

  std::string describe() const;
};

// The named corners, in one type.
std::vector<AttentionCase> corner_cases(DType dtype);

// A small problem drawn from a seed: head sizes 8..256, groups of 1..4, any lifetimes and layouts.
AttentionCase random_case(uint64_t seed, DType dtype);

// Strides of a [B, H, T, D] array in the case's memory: [B, H, T, D], or [B, T, H, D + gap].
kernels::Strides strides_of(const AttentionCase& c, int heads, int gap);

// Memory of one [B, H, T, D] array.
class Tensor4 {
 public:
  Tensor4() = default;
  Tensor4(const AttentionCase& c, int heads);  // filled with NaN
  void* data() { return bytes_.data(); }
  kernels::Strides stride() const { return stride_; }
  double get(int b, int h, int t, int c) const;
  void set(int b, int h, int t, int c, double value);
  // All elements in [B, H, T, D] order.
  std::vector<double> values() const;
  // True while everything outside [B, H, T, D] still is NaN.
  bool guards_are_intact() const;

 private:
  int batch_ = 0, heads_ = 0, tokens_ = 0, head_dim_ = 0;
  DType dtype_ = DType::kFloat32;
  kernels::Strides stride_;
  std::vector<uint8_t> bytes_;
};

struct AttentionInputs {
  explicit AttentionInputs(const AttentionCase& c);
  AttentionCase problem;
  float scale = 1;
  Tensor4 q, k, v, dout;
  std::vector<int32_t> last, lengths;  // lengths empty: null
  std::vector<int32_t> horizons;       // [3, B, Hkv, T]: for ever, next Global, window
};

// The sizes of a problem as the forward or the backward pass takes them.
template <class Params>
Params sizes_of(const AttentionInputs& in) {
  const AttentionCase& c = in.problem;
  Params p;
  p.batch = c.batch;
  p.q_heads = c.q_heads;
  p.kv_heads = c.kv_heads;
  p.tokens = c.tokens;
  p.head_dim = c.head_dim;
  p.scale = in.scale;
  p.dtype = c.dtype;
  return p;
}

struct ForwardResult {
  Tensor4 out;
  std::vector<float> lse, mass;
};
using Forward = void (*)(const kernels::AttentionForward&);
ForwardResult run_forward(AttentionInputs& inputs, Forward kernel,
                          const ParallelFor& parallel = serial());

struct BackwardOptions {
  int horizon_count = 3;
  bool causal_role_normaliser = false;  // role_lse over all causal keys
  bool limit_factor = true;
};
struct BackwardResult {
  Tensor4 dq, dk, dv;
  std::vector<float> role_sums;
};
using Backward = void (*)(const kernels::AttentionBackward&);
// `forward` supplies out and lse.
BackwardResult run_backward(AttentionInputs& inputs, ForwardResult& forward, Backward kernel,
                            const BackwardOptions& options = {},
                            const ParallelFor& parallel = serial());

// The obvious loops in float, rounding where the type rounds: what a careful but plain
// implementation in the same type achieves. The yardstick of the tolerances.
void plain_forward(const kernels::AttentionForward&);
void plain_backward(const kernels::AttentionBackward&);
// The same with the channels summed in the opposite order. On a small problem one order may be
// exact by luck; the worse of the two is what a plain implementation can promise.
void plain_forward_again(const kernels::AttentionForward&);
void plain_backward_again(const kernels::AttentionBackward&);

// "" if `got` is at most twice as wrong as the worse of two plain results plus one rounding of the
// output, and has NaN and inf where `truth` has them; otherwise a line with the worst index.
std::string compare(const char* what, const std::vector<double>& got,
                    const std::vector<double>& plain, const std::vector<double>& plain_again,
                    const std::vector<double>& truth, DType dtype, const AttentionCase& c);
// With one plain result.
inline std::string compare(const char* what, const std::vector<double>& got,
                           const std::vector<double>& plain, const std::vector<double>& truth,
                           DType dtype, const AttentionCase& c) {
  return compare(what, got, plain, plain, truth, dtype, c);
}
std::vector<double> widen(const std::vector<float>& values);

}  // namespace natslm::test
