// The vector building blocks of the CPU attention kernels, compiled once per instruction set.
//
// Everything is transposed: the lanes of a vector are query rows, so that maxima, sums and masks
// need no work across lanes, and one scalar of a key or value row is broadcast to all of them. A
// block is kBlockRows query rows; a [n, kBlockRows] array in memory is a "block matrix".
// SPDX-License-Identifier: Apache-2.0
#if defined(NATSLM_KERNELS_CPU_TILE_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NATSLM_KERNELS_CPU_TILE_MATH_INL_H_
#undef NATSLM_KERNELS_CPU_TILE_MATH_INL_H_
#else
#define NATSLM_KERNELS_CPU_TILE_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <numeric>

#include "natslm/base/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace natslm::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Ints = hn::RebindToSigned<Floats>;
using Vec = hn::Vec<Floats>;

constexpr Floats kFloats;
constexpr Ints kInts;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(Floats()));
// Vectors of rows times broadcast scalars: enough independent sums to hide the latency of a
// multiply-add, and as few loads for each as the registers (32, or 16) allow.
constexpr int kVectors = kLanes == 16 ? 2 : 3;
constexpr int kBlockRows = kVectors * kLanes;
constexpr int kGroup = 8;  // keys, or channels, that are computed together
constexpr int kScalars = kLanes == 16 ? 8 : 4;
static_assert(kGroup % kScalars == 0);
// Floats between packed keys or values: a constant, so that one register addresses all rows of a
// group (with a variable stride the inner loop moved eight pointers around: a tenth slower), and an
// odd number of cache lines, so that the rows spread over all sets of the first cache level.
constexpr int64_t kRowStride = 256 + 16;

// Queries a tile takes when `group` query heads share a KV head: as few as fill whole blocks of
// rows, but at least `min_rows` rows, so that packing a key is cheap beside using it.
constexpr int tile_of(int group, int min_rows) {
  const int step = kBlockRows / std::gcd(kBlockRows, group);
  return (min_rows + group * step - 1) / (group * step) * step;
}

// Adding it to x leaves round(x) + 127 in the low bits: the biased exponent of a float.
constexpr float kExponentMagic = 12582912.0f + 127.0f;

// 2^r times the power of two in the low bits of `shifted`, for |r| <= 1/2.
HWY_INLINE Vec exp2_of_rest(Vec r, Vec shifted) {
  // Smallest largest relative error of 1 + r q(r) on [-1/2, 1/2]: 9e-8, 2e-7 with the roundings. A
  // seventh coefficient would make it 2e-9, hardly better than the float that it ends in.
  Vec p = hn::Set(kFloats, 1.326472910e-03f);
  p = hn::MulAdd(p, r, hn::Set(kFloats, 9.671512640e-03f));
  p = hn::MulAdd(p, r, hn::Set(kFloats, 5.550733737e-02f));
  p = hn::MulAdd(p, r, hn::Set(kFloats, 2.402224209e-01f));
  p = hn::MulAdd(p, r, hn::Set(kFloats, 6.931469776e-01f));
  p = hn::MulAdd(p, r, hn::Set(kFloats, 1.0f));
  return hn::Mul(p, hn::BitCast(kFloats, hn::ShiftLeft<23>(hn::BitCast(kInts, shifted))));
}

// e^x for x <= 89: the nearer to 0 the better, exactly 1 there, to 2e-7 and 2e-8 |x|; exactly 0
// from -88.1 on, inf from 88.8 on. NaN stays NaN. Log2 e folded into the caller's factor of x would
// save one instruction, but scores of hundreds are then no longer exact before they cancel.
HWY_INLINE Vec exp(Vec x) {
  x = hn::Max(hn::Set(kFloats, -88.1f), x);
  const Vec magic = hn::Set(kFloats, kExponentMagic), log2e = hn::Set(kFloats, 1.44269504f);
  const Vec shifted = hn::MulAdd(x, log2e, magic);
  return exp2_of_rest(hn::MulSub(x, log2e, hn::Sub(shifted, magic)), shifted);
}

// 2^x for x <= 128 to 2e-7; exactly 0 from -127 on. NaN stays NaN.
HWY_INLINE Vec exp2(Vec x) {
  x = hn::Max(hn::Set(kFloats, -127.0f), x);
  const Vec magic = hn::Set(kFloats, kExponentMagic);
  const Vec shifted = hn::Add(x, magic);
  return exp2_of_rest(hn::Sub(x, hn::Sub(shifted, magic)), shifted);
}

// sum[m][n] += sum over i < count of a(m, i) * b[i][n], where a(m, i) is a[m * stride + i] (kByRow:
// each m is a row) or a[i * stride + m] (each m is a column), and b has b_stride floats a row. With
// everything in the first cache level 96 % of what the multipliers of a Zen 3 core can do.
template <bool kByRow, int kM, int kN>
HWY_INLINE void multiply_add(const float* HWY_RESTRICT a, int64_t stride,
                             const float* HWY_RESTRICT b, int64_t b_stride, int64_t count,
                             Vec (&sum)[kM][kN]) {
  for (int64_t i = 0; i < count; ++i) {
    Vec row[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) row[n] = hn::Load(kFloats, b + i * b_stride + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Vec scalar = hn::Set(kFloats, kByRow ? a[m * stride + i] : a[i * stride + m]);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sum[m][n] = hn::MulAdd(scalar, row[n], sum[m][n]);
    }
  }
}

// Accumulators from and to memory: at(m) is the address of row m.
template <int kM, int kN, class At>
HWY_INLINE void load_rows(const At& at, Vec (&sum)[kM][kN]) {
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    const float* from = at(m);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) sum[m][n] = hn::Load(kFloats, from + n * kLanes);
  }
}
template <int kM, int kN, class At>
HWY_INLINE void store_rows(const At& at, int count, const Vec (&sum)[kM][kN]) {
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    if (m >= count) break;
    float* to = at(m);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) hn::Store(sum[m][n], kFloats, to + n * kLanes);
  }
}

// c[m][n] = sum over i of rows[m][i] * b[i][n] for kGroup packed rows: scores, and dout . v.
HWY_INLINE void products_of_rows(const float* HWY_RESTRICT rows, const float* HWY_RESTRICT b,
                                 int64_t count, float* HWY_RESTRICT c) {
  for (int m0 = 0; m0 < kGroup; m0 += kScalars) {
    Vec sum[kScalars][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kScalars; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[m][n] = hn::Zero(kFloats);
    }
    multiply_add<true>(rows + m0 * kRowStride, kRowStride, b, kBlockRows, count, sum);
    store_rows([&](int m) { return c + (m0 + m) * kBlockRows; }, kScalars, sum);
  }
}

// to[c][r] = from[r][c]; rows and columns are multiples of 4, the strides count floats.
inline void transpose(const float* HWY_RESTRICT from, int64_t from_stride, int rows, int columns,
                      float* HWY_RESTRICT to, int64_t to_stride) {
  const hn::FixedTag<float, 4> d;
  const hn::Repartition<double, decltype(d)> dd;
  for (int r = 0; r < rows; r += 4) {
    for (int c = 0; c < columns; c += 4) {
      const float* in = from + r * from_stride + c;
      const auto a0 = hn::LoadU(d, in), a1 = hn::LoadU(d, in + from_stride);
      const auto a2 = hn::LoadU(d, in + 2 * from_stride), a3 = hn::LoadU(d, in + 3 * from_stride);
      const auto b0 = hn::BitCast(dd, hn::InterleaveLower(d, a0, a1));
      const auto b1 = hn::BitCast(dd, hn::InterleaveLower(d, a2, a3));
      const auto b2 = hn::BitCast(dd, hn::InterleaveUpper(d, a0, a1));
      const auto b3 = hn::BitCast(dd, hn::InterleaveUpper(d, a2, a3));
      float* out = to + c * to_stride + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, b0, b1)), d, out);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, b0, b1)), d, out + to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, b2, b3)), d, out + 2 * to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, b2, b3)), d, out + 3 * to_stride);
    }
  }
}

// to[0..count) = factor * from[0..count) as float; count is a multiple of 8. Returns false if
// something is infinite or NaN.
HWY_INLINE bool read_row(const void* HWY_RESTRICT from, DType dtype, int64_t offset, int count,
                         float factor, float* HWY_RESTRICT to) {
  const hn::CappedTag<float, 8> d;
  const hn::Rebind<uint16_t, decltype(d)> d16;
  const hn::RebindToUnsigned<decltype(d)> d32;
  const int step = static_cast<int>(hn::Lanes(d));
  const auto scale = hn::Set(d, factor);
  auto poison = hn::Zero(d);  // x - x is NaN for every x that is not finite, and +0 for the others
  const auto take = [&](auto x, float* at) HWY_ATTR {
    poison = hn::Or(poison, hn::Sub(x, x));
    hn::StoreU(x, d, at);
  };
  if (dtype == DType::kFloat32) {
    const float* in = static_cast<const float*>(from) + offset;
    if (factor == 1.0f) {
      for (int c = 0; c < count; c += step) take(hn::LoadU(d, in + c), to + c);
    } else {
      for (int c = 0; c < count; c += step) take(hn::Mul(hn::LoadU(d, in + c), scale), to + c);
    }
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(from) + offset;
    for (int c = 0; c < count; c += step) {
      const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, in + c)));
      take(hn::Mul(hn::BitCast(d, bits), scale), to + c);
    }
  }
  return hn::AllTrue(d, hn::Eq(poison, hn::Zero(d)));
}

// The inverse of read_row: rounds to nearest even where the type is bf16.
inline void write_row(const float* HWY_RESTRICT from, int count, float factor, void* to,
                      DType dtype, int64_t offset) {
  const hn::CappedTag<float, 8> d;
  const hn::Rebind<uint16_t, decltype(d)> d16;
  const hn::RebindToUnsigned<decltype(d)> d32;
  const hn::RebindToSigned<decltype(d)> di32;
  const int step = static_cast<int>(hn::Lanes(d));
  const auto scale = hn::Set(d, factor);
  for (int c = 0; c < count; c += step) {
    const auto x = hn::Mul(hn::LoadU(d, from + c), scale);
    if (dtype == DType::kFloat32) {
      hn::StoreU(x, d, static_cast<float*>(to) + offset + c);
      continue;
    }
    const auto bits = hn::BitCast(d32, x);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
    const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff)));
    const auto quiet = hn::Or(bits, hn::Set(d32, 0x400000));  // a NaN stays one
    const auto nan = hn::RebindMask(d32, hn::IsNaN(x));
    const auto high = hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, rounded));
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, high)), d16,
               static_cast<uint16_t*>(to) + offset + c);
  }
}

inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

}  // namespace HWY_NAMESPACE
}  // namespace natslm::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // NATSLM_KERNELS_CPU_TILE_MATH_INL_H_
