// The lanes of a vector are neighbouring inputs. Each block of four matrix rows is read once for up
// to three rows of x, whose vectors it shares; a bf16 number is widened by a shift.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/few_rows_linear.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "natslm/kernels/cpu/few_rows_linear.cc"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>  // compiles this file once for each target
#include <hwy/highway.h>

#include <algorithm>

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Vec = hn::Vec<Floats>;
constexpr Floats kFloats;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(Floats()));
constexpr int kOutputs = 4, kMaxRows = 3;
// Outputs a task computes: enough work for a thread to be asked for it.
constexpr int64_t kTaskOutputs = 64;

HWY_INLINE Vec widened(const BFloat16* from) {
  const hn::Rebind<uint16_t, Floats> d16;
  const hn::RebindToUnsigned<Floats> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(kFloats, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

// kRows rows of x times kCount rows of the matrix.
template <int kRows, int kCount>
void block(const FewRowsLinear& p, int64_t row, int64_t output) {
  const float* x = p.x + row * p.in;
  const BFloat16* weight = p.weight + output * p.in;
  Vec sum[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < kCount; ++o) sum[r][o] = hn::Zero(kFloats);
  }
  int64_t i = 0;
  for (; i + kLanes <= p.in; i += kLanes) {
    Vec w[kCount];
#pragma GCC unroll 4
    for (int o = 0; o < kCount; ++o) {
      w[o] = widened(weight + o * p.in + i);
      // The same place in the next block.
      if (row == 0) hwy::Prefetch(weight + (o + kCount) * p.in + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec of_row = hn::LoadU(kFloats, x + r * p.in + i);
#pragma GCC unroll 4
      for (int o = 0; o < kCount; ++o) sum[r][o] = hn::MulAdd(of_row, w[o], sum[r][o]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < kCount; ++o) {
      float total = hn::GetLane(hn::SumOfLanes(kFloats, sum[r][o]));
      for (int64_t rest = i; rest < p.in; ++rest) {
        total += x[r * p.in + rest] * static_cast<float>(weight[o * p.in + rest]);
      }
      if (p.bias) total += p.bias[output + o];
      p.out[(row + r) * p.out_size + output + o] = total;
    }
  }
}

template <int kCount>
void all_rows(const FewRowsLinear& p, int64_t output) {
  int64_t row = 0;
  for (; row + kMaxRows <= p.rows; row += kMaxRows) block<kMaxRows, kCount>(p, row, output);
  if (p.rows - row == 2) block<2, kCount>(p, row, output);
  if (p.rows - row == 1) block<1, kCount>(p, row, output);
}

void run_few_rows_linear(const FewRowsLinear& p) {
  const int64_t tasks = (p.out_size + kTaskOutputs - 1) / kTaskOutputs;
  p.parallel(tasks, [&](int64_t task, int) {
    int64_t output = task * kTaskOutputs;
    const int64_t end = std::min(output + kTaskOutputs, p.out_size);
    for (; output + kOutputs <= end; output += kOutputs) all_rows<kOutputs>(p, output);
    for (; output < end; ++output) all_rows<1>(p, output);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace natslm::kernels::cpu {

HWY_EXPORT(run_few_rows_linear);

std::string_view why_not(const FewRowsLinear&) {
  return "";
}

void run(const FewRowsLinear& p) {
  HWY_DYNAMIC_DISPATCH(run_few_rows_linear)(p);
}

}  // namespace natslm::kernels::cpu
#endif  // HWY_ONCE
