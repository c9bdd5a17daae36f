// Attention problems of attention_case.h for backends that read device memory: key orders, upload,
// poisoned and guarded outputs, and a comparison that tells enough to find a fault without the
// device at hand.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"
#include "tests/support/attention_case.h"
#include "tests/support/device_memory.h"

namespace natslm::test {

// A backend, or one of the loops it is measured by.
struct AttentionBackend {
  const char* name;
  bool on_gpu;
  std::string_view (*forward_why_not)(const kernels::AttentionForward&);
  size_t (*forward_workspace)(const kernels::AttentionForward&);  // null: needs none
  void (*forward)(const kernels::AttentionForward&, CUstream_st*);
  // Null: there is no backward pass.
  std::string_view (*backward_why_not)(const kernels::AttentionBackward&);
  size_t (*backward_workspace)(const kernels::AttentionBackward&);
  void (*backward)(const kernels::AttentionBackward&, CUstream_st*);
};

// What matrix units do, in plain loops: bf16 operands (probabilities and their gradients too),
// products of 16 pairs aligned with the sum so far and cut at 24 bits, exponentials to base two.
// Beside plain_forward more yardsticks: no kernel on matrix units can sum better. 0: straight on; 1
// and 2: with the channels in other orders, and with scores as powers of two from the start and the
// precision of the unit for exponentials, as kernels have them.
inline constexpr int kMatrixUnitManners = 3;
template <int kManner>
void matrix_unit_forward(const kernels::AttentionForward&);
template <int kManner>
void matrix_unit_backward(const kernels::AttentionBackward&);

extern const AttentionBackend kReferenceBackend, kPlainBackend, kPlainAgainBackend,
    kMatrixUnitBackends[kMatrixUnitManners], kCpuBackend, kCudaBackend, kSm90Backend,
    kSm90ShortBackend, kSm90WholeBackend;

// An order of the keys as a KeyOrder wants it, whatever the lifetimes: what lives for ever; then,
// position by position, what lives longer than all taken before; the rest.
struct HostKeyOrder {
  std::vector<int32_t> order;  // [B, Hkv, T]; past a length a number that must not be used
  std::vector<int32_t> ends;   // [B, Hkv, 3]
  int32_t reach = 0;
};
// `brief`: keys whose last - position is at most this go straight to the rest; -1: all but those
// that live for ever do.
HostKeyOrder order_keys(const AttentionCase& c, const std::vector<int32_t>& last,
                        const std::vector<int32_t>& lengths, int32_t brief);

struct DeviceProblem {
  explicit DeviceProblem(const AttentionCase& c, const BackwardOptions& options = {});
  AttentionInputs inputs;
  BackwardOptions options;
  HostKeyOrder order;
  std::vector<int32_t> horizons;  // [4, B, Hkv, T]: those of the inputs and `last`
  std::vector<float> role_lse;    // [B, Hq, T] if the options ask for it, else empty
};

struct RunOptions {
  bool sorted = false;
  bool mass = false;
  uint8_t workspace = 0xff;  // every byte of it before the run
};

// Outputs in [B, H, T, D] order, and what was wrong around them: guards, padding, changed inputs.
struct ForwardOutputs {
  std::vector<double> out, lse, mass;
  std::string damage;
  std::string refused;  // why_not; nothing ran then
};
struct BackwardOutputs {
  std::vector<double> dq, dk, dv, role_sums;  // role_sums [horizon_count, B, Hkv, T]
  std::string damage, refused;
};
ForwardOutputs run_forward(const DeviceProblem& problem, Memory& memory,
                           const AttentionBackend& backend, const RunOptions& options = {});
// out [B, Hq, T, D] and lse as a forward pass left them.
BackwardOutputs run_backward(const DeviceProblem& problem, const ForwardOutputs& forward,
                             Memory& memory, const AttentionBackend& backend,
                             const RunOptions& options = {});

// What an output must be, and the yardsticks of its tolerance.
struct Expected {
  const char* name;
  DType dtype;
  int heads, rows, columns;  // of each [heads, rows, columns] block; any number of blocks
  std::vector<double> truth;
  std::vector<std::vector<double>> plain;  // results of plain implementations
};
// "" if `got` is at most twice as wrong as the worst of the plain results plus one rounding of the
// largest output, and has NaN and inf where the truth has them. Otherwise several lines: the worst
// element, which rows, heads and columns are wrong, and what the first wrong rows look like.
// `share`, if given, becomes the largest error as a share of what is allowed.
std::string compare(const Expected& expected, const std::vector<double>& got,
                    double* share = nullptr);

// The bits of two results agree.
bool identical(const std::vector<double>& a, const std::vector<double>& b);

// {0, 1, 2, 5} -> "0-2,5".
std::string ranges(const std::vector<int>& ascending);

// The sum of products as a matrix unit makes it (kMatrixUnitBackends).
float matrix_unit_dot(const float* a, const float* b, int n);

}  // namespace natslm::test
