// One struct a type: what a block is, and the published formula for it, operations in its order.
// This file is compiled without contraction: a fused multiply-add would round once where the
// formulas round twice.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/dequantize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/kernels/cpu/quantization_grids.h"

namespace natslm::kernels::cpu {
namespace {

template <class T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// IEEE half precision, subnormals included; written so that a loop over it becomes vector code.
float from_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  const uint32_t rebias = rest >= 0x7c00u ? 2 * (112u << 23) : 112u << 23;
  const uint32_t normal = (rest << 13) + rebias;
  const auto subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  return std::bit_cast<float>((rest < 0x400u ? subnormal : normal) | sign);
}

float half_at(const uint8_t* at) {
  return from_half(load<uint16_t>(at));
}

// ---- plain types ----

struct F32 {
  static constexpr WeightType kType = WeightType::kF32;
  static void decode(const uint8_t* in, float* out) { *out = load<float>(in); }
};

struct F16 {
  static constexpr WeightType kType = WeightType::kF16;
  static void decode(const uint8_t* in, float* out) { *out = half_at(in); }
};

struct BF16 {
  static constexpr WeightType kType = WeightType::kBF16;
  static void decode(const uint8_t* in, float* out) {
    *out = std::bit_cast<float>(uint32_t{load<uint16_t>(in)} << 16);
  }
};

struct F64 {
  static constexpr WeightType kType = WeightType::kF64;
  static void decode(const uint8_t* in, float* out) { *out = static_cast<float>(load<double>(in)); }
};

// ---- blocks of 32: a scale, perhaps a minimum, the low nibbles first ----

struct Q4_0 {
  static constexpr WeightType kType = WeightType::kQ4_0;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const uint8_t* qs = in + 2;
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>((qs[i] & 15) - 8);
      out[i + 16] = d * static_cast<float>((qs[i] >> 4) - 8);
    }
  }
};

struct Q4_1 {
  static constexpr WeightType kType = WeightType::kQ4_1;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in), m = half_at(in + 2);
    const uint8_t* qs = in + 4;
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>(qs[i] & 15) + m;
      out[i + 16] = d * static_cast<float>(qs[i] >> 4) + m;
    }
  }
};

// The fifth bit of element i is bit i of a word of its own.
int fifth_bit(uint32_t high, int i) {
  return static_cast<int>(high >> i & 1) << 4;
}

struct Q5_0 {
  static constexpr WeightType kType = WeightType::kQ5_0;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const auto high = load<uint32_t>(in + 2);
    const uint8_t* qs = in + 6;
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>(((qs[i] & 15) | fifth_bit(high, i)) - 16);
      out[i + 16] = d * static_cast<float>(((qs[i] >> 4) | fifth_bit(high, i + 16)) - 16);
    }
  }
};

struct Q5_1 {
  static constexpr WeightType kType = WeightType::kQ5_1;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in), m = half_at(in + 2);
    const auto high = load<uint32_t>(in + 4);
    const uint8_t* qs = in + 8;
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>((qs[i] & 15) | fifth_bit(high, i)) + m;
      out[i + 16] = d * static_cast<float>((qs[i] >> 4) | fifth_bit(high, i + 16)) + m;
    }
  }
};

struct Q8_0 {
  static constexpr WeightType kType = WeightType::kQ8_0;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(in[2 + i])) * d;
  }
};

struct IQ4NL {
  static constexpr WeightType kType = WeightType::kIQ4NL;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const uint8_t* qs = in + 2;
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>(kIQ4Values[qs[i] & 15]);
      out[i + 16] = d * static_cast<float>(kIQ4Values[qs[i] >> 4]);
    }
  }
};

struct MXFP4 {
  static constexpr WeightType kType = WeightType::kMXFP4;
  static void decode(const uint8_t* in, float* out) {
    // Half of 2^(e - 127), as the values are doubled; the two smallest are subnormal.
    const uint32_t e = in[0];
    const auto d = std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    const uint8_t* qs = in + 1;
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>(kMXFP4Values[qs[i] & 15]);
      out[i + 16] = d * static_cast<float>(kMXFP4Values[qs[i] >> 4]);
    }
  }
};

// ---- blocks of 256 with scales of their own (K types) ----

struct Q2K {
  static constexpr WeightType kType = WeightType::kQ2K;
  static void decode(const uint8_t* in, float* out) {
    const uint8_t *scales = in, *qs = in + 16;
    const float d = half_at(in + 80), dmin = half_at(in + 82);
    for (int part = 0; part < 16; ++part) {  // of 16 elements
      const float dl = d * static_cast<float>(scales[part] & 15);
      const float ml = dmin * static_cast<float>(scales[part] >> 4);
      const uint8_t* q = qs + part / 8 * 32 + part % 2 * 16;
      const int shift = part % 8 / 2 * 2;
      for (int i = 0; i < 16; ++i)
        out[part * 16 + i] = dl * static_cast<float>(q[i] >> shift & 3) - ml;
    }
  }
};

struct Q3K {
  static constexpr WeightType kType = WeightType::kQ3K;
  static void decode(const uint8_t* in, float* out) {
    const uint8_t *mask = in, *qs = in + 32, *scales = in + 96;
    const float d = half_at(in + 108);
    for (int part = 0; part < 16; ++part) {  // of 16 elements
      const int low = scales[part % 8] >> (part / 8 * 4) & 15;
      const int high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
      const float dl = d * static_cast<float>((low | high << 4) - 32);
      const uint8_t *q = qs + part / 8 * 32 + part % 2 * 16, *m = mask + part % 2 * 16;
      const int shift = part % 8 / 2 * 2, bit = part / 2;
      for (int i = 0; i < 16; ++i) {  // a bit that is set takes nothing away
        const int value = (q[i] >> shift & 3) - ((m[i] >> bit & 1) ^ 1) * 4;
        out[part * 16 + i] = dl * static_cast<float>(value);
      }
    }
  }
};

// Eight 6-bit scales and minima in twelve bytes, as in Q4_K and Q5_K.
struct ScalesAndMinima {
  float scale[8], minimum[8];
  explicit ScalesAndMinima(const uint8_t* in) {
    const float d = half_at(in), dmin = half_at(in + 2);
    const uint8_t* packed = in + 4;
    for (int i = 0; i < 4; ++i) {
      const int a = packed[i], b = packed[4 + i], c = packed[8 + i];
      scale[i] = d * static_cast<float>(a & 63);
      minimum[i] = dmin * static_cast<float>(b & 63);
      scale[4 + i] = d * static_cast<float>((c & 15) | (a >> 2 & 48));
      minimum[4 + i] = dmin * static_cast<float>(c >> 4 | (b >> 2 & 48));
    }
  }
};

struct Q4K {
  static constexpr WeightType kType = WeightType::kQ4K;
  static void decode(const uint8_t* in, float* out) {
    const ScalesAndMinima s(in);
    for (int part = 0; part < 8; ++part) {  // of 32 elements
      const uint8_t* q = in + 16 + part / 2 * 32;
      const float scale = s.scale[part], minimum = s.minimum[part];
      const int shift = part % 2 * 4;
      for (int i = 0; i < 32; ++i)
        out[part * 32 + i] = scale * static_cast<float>(q[i] >> shift & 15) - minimum;
    }
  }
};

struct Q5K {
  static constexpr WeightType kType = WeightType::kQ5K;
  static void decode(const uint8_t* in, float* out) {
    const ScalesAndMinima s(in);
    const uint8_t* high = in + 16;
    for (int part = 0; part < 8; ++part) {  // of 32 elements
      const uint8_t* q = in + 48 + part / 2 * 32;
      const float scale = s.scale[part], minimum = s.minimum[part];
      const int shift = part % 2 * 4;
      for (int i = 0; i < 32; ++i) {
        const int value = (q[i] >> shift & 15) | (high[i] >> part & 1) << 4;
        out[part * 32 + i] = scale * static_cast<float>(value) - minimum;
      }
    }
  }
};

struct Q6K {
  static constexpr WeightType kType = WeightType::kQ6K;
  static void decode(const uint8_t* in, float* out) {
    const uint8_t *ql = in, *qh = in + 128, *scales = in + 192;
    const float d = half_at(in + 208);
    for (int part = 0; part < 16; ++part) {  // of 16 elements
      const float dl = d * static_cast<float>(static_cast<int8_t>(scales[part]));
      const uint8_t* low = ql + part / 8 * 64 + part % 4 * 16;
      const uint8_t* high = qh + part / 8 * 32 + part % 2 * 16;
      const int low_shift = part % 8 / 4 * 4, high_shift = part % 8 / 2 * 2;
      for (int i = 0; i < 16; ++i) {
        const int value = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        out[part * 16 + i] = dl * static_cast<float>(value - 32);
      }
    }
  }
};

struct IQ4XS {
  static constexpr WeightType kType = WeightType::kIQ4XS;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const int high = load<uint16_t>(in + 2);
    const uint8_t *low = in + 4, *qs = in + 8;
    for (int part = 0; part < 8; ++part) {  // of 32 elements
      const int scale = (low[part / 2] >> (part % 2 * 4) & 15) | (high >> (2 * part) & 3) << 4;
      const float dl = d * static_cast<float>(scale - 32);
      const uint8_t* q = qs + part * 16;
      for (int i = 0; i < 16; ++i) {
        out[part * 32 + i] = dl * static_cast<float>(kIQ4Values[q[i] & 15]);
        out[part * 32 + 16 + i] = dl * static_cast<float>(kIQ4Values[q[i] >> 4]);
      }
    }
  }
};

// ---- blocks of 256 whose elements come from grids (IQ1, IQ2, IQ3) ----

// Grid entries written out: kWidth elements each.
template <int kWidth, size_t kEntries, size_t kValues>
constexpr auto expand(const std::array<uint16_t, kEntries>& grid,
                      const std::array<int8_t, kValues>& values) {
  std::array<std::array<int8_t, kWidth>, kEntries> result{};
  constexpr int kBits = 16 / kWidth;
  for (size_t i = 0; i < kEntries; ++i)
    for (int j = 0; j < kWidth; ++j) {
      const size_t value = grid[i] >> (kBits * j) & (kBits == 2 ? 3 : 7);
      result[i][j] = values[value];
    }
  return result;
}

constexpr auto kIQ1 = expand<8>(kIQ1Grid, kIQ1Values);
constexpr auto kIQ2XXS = expand<8>(kIQ2XXSGrid, kIQ2XXSValues);
constexpr auto kIQ2XS = expand<8>(kIQ2XSGrid, kIQ2XSValues);
constexpr auto kIQ2S = expand<8>(kIQ2SGrid, kIQ2SValues);
constexpr auto kIQ3XXS = expand<4>(kIQ3XXSGrid, kIQ3XXSValues);
constexpr auto kIQ3S = expand<4>(kIQ3SGrid, kIQ3SValues);

// Seven signs are stored; the eighth makes the number of minus signs even.
constexpr uint32_t eight_signs(uint32_t seven) {
  return seven | static_cast<uint32_t>(std::popcount(seven) & 1) << 7;
}

template <size_t kWidth>
void signed_elements(float scale, const std::array<int8_t, kWidth>& entry, uint32_t signs,
                     float* out) {
  for (size_t j = 0; j < kWidth; ++j) {
    const float value = scale * static_cast<float>(entry[j]);
    out[j] = std::bit_cast<float>(std::bit_cast<uint32_t>(value) ^ (signs >> j & 1) << 31);
  }
}

struct IQ2XXS {
  static constexpr WeightType kType = WeightType::kIQ2XXS;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    for (int part = 0; part < 8; ++part) {  // of 32 elements
      const uint8_t* q = in + 2 + part * 8;
      const auto signs = load<uint32_t>(q + 4);
      const float db = d * (0.5f + static_cast<float>(signs >> 28)) * 0.25f;
      for (int i = 0; i < 4; ++i)
        signed_elements(db, kIQ2XXS[q[i]], eight_signs(signs >> (7 * i) & 127),
                        out + part * 32 + i * 8);
    }
  }
};

struct IQ2XS {
  static constexpr WeightType kType = WeightType::kIQ2XS;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const uint8_t* scales = in + 66;
    for (int i = 0; i < 32; ++i) {  // of 8 elements
      const uint32_t q = load<uint16_t>(in + 2 + 2 * i);
      const int scale = scales[i / 4] >> (i / 2 % 2 * 4) & 15;
      const float db = d * (0.5f + static_cast<float>(scale)) * 0.25f;
      signed_elements(db, kIQ2XS[q & 511], eight_signs(q >> 9), out + i * 8);
    }
  }
};

struct IQ2S {
  static constexpr WeightType kType = WeightType::kIQ2S;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const uint8_t *qs = in + 2, *signs = in + 34, *high = in + 66, *scales = in + 74;
    for (int i = 0; i < 32; ++i) {  // of 8 elements
      const int scale = scales[i / 4] >> (i / 2 % 2 * 4) & 15;
      const float db = d * (0.5f + static_cast<float>(scale)) * 0.25f;
      const int entry = qs[i] | (high[i / 4] >> (i % 4 * 2) & 3) << 8;
      signed_elements(db, kIQ2S[entry], signs[i], out + i * 8);
    }
  }
};

struct IQ3XXS {
  static constexpr WeightType kType = WeightType::kIQ3XXS;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    for (int part = 0; part < 8; ++part) {  // of 32 elements
      const uint8_t* q = in + 2 + part * 8;
      const auto signs = load<uint32_t>(in + 66 + part * 4);
      const float db = d * (0.5f + static_cast<float>(signs >> 28)) * 0.5f;
      for (int i = 0; i < 8; ++i)
        signed_elements(db, kIQ3XXS[q[i]], eight_signs(signs >> (i / 2 * 7) & 127) >> (i % 2 * 4),
                        out + part * 32 + i * 4);
    }
  }
};

struct IQ3S {
  static constexpr WeightType kType = WeightType::kIQ3S;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const uint8_t *qs = in + 2, *high = in + 66, *signs = in + 74, *scales = in + 106;
    for (int i = 0; i < 64; ++i) {  // of 4 elements
      const int scale = scales[i / 16] >> (i / 8 % 2 * 4) & 15;
      const float db = d * static_cast<float>(1 + 2 * scale);
      const int entry = qs[i] | (high[i / 8] >> (i % 8) & 1) << 8;
      signed_elements(db, kIQ3S[entry], signs[i / 2] >> (i % 2 * 4), out + i * 4);
    }
  }
};

// IQ1: values -1, 0, 1, all moved by an eighth up or down.
void moved_elements(float scale, const std::array<int8_t, 8>& entry, float delta, float* out) {
  for (int j = 0; j < 8; ++j) out[j] = scale * (static_cast<float>(entry[j]) + delta);
}

struct IQ1S {
  static constexpr WeightType kType = WeightType::kIQ1S;
  static void decode(const uint8_t* in, float* out) {
    const float d = half_at(in);
    const uint8_t* qs = in + 2;
    for (int part = 0; part < 8; ++part) {  // of 32 elements
      const int high = load<uint16_t>(in + 34 + 2 * part);
      const float dl = d * static_cast<float>(2 * (high >> 12 & 7) + 1);
      const float delta = (high & 0x8000) == 0 ? 0.125f : -0.125f;
      for (int i = 0; i < 4; ++i) {
        const int entry = qs[part * 4 + i] | (high >> (3 * i) & 7) << 8;
        moved_elements(dl, kIQ1[entry], delta, out + part * 32 + i * 8);
      }
    }
  }
};

struct IQ1M {
  static constexpr WeightType kType = WeightType::kIQ1M;
  static void decode(const uint8_t* in, float* out) {
    const uint8_t *qs = in, *high = in + 32;
    std::array<uint32_t, 4> scales;  // four of 3 bits each, above them a nibble of d
    uint32_t d_bits = 0;
    for (int i = 0; i < 4; ++i) {
      scales[i] = load<uint16_t>(in + 48 + 2 * i);
      d_bits |= scales[i] >> 12 << (4 * i);
    }
    const float d = from_half(static_cast<uint16_t>(d_bits));
    for (int i = 0; i < 32; ++i) {  // of 8 elements
      const float dl = d * static_cast<float>(2 * (scales[i / 8] >> (i / 2 % 4 * 3) & 7) + 1);
      const int nibble = high[i / 2] >> (i % 2 * 4) & 15;
      const int entry = qs[i] | (nibble & 7) << 8;
      moved_elements(dl, kIQ1[entry], (nibble & 8) == 0 ? 0.125f : -0.125f, out + i * 8);
    }
  }
};

// ---- rows of blocks ----

// Calls f with the struct of the type; nothing if there is none.
template <class... Structs>
struct Known {
  template <class F>
  static void visit(WeightType type, F&& f) {
    (void)((Structs::kType == type && (f.template operator()<Structs>(), true)) || ...);
  }
};
using AllKnown = Known<F32, F16, BF16, F64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K,
                       IQ1S, IQ1M, IQ2XXS, IQ2XS, IQ2S, IQ3XXS, IQ3S, IQ4NL, IQ4XS, MXFP4>;

// BFloat16's rounding, without a branch.
void round_to_bf16(const float* in, uint16_t* out, int count) {
  for (int i = 0; i < count; ++i) {
    const auto wide = std::bit_cast<uint32_t>(in[i]);
    const uint32_t rounded = (wide + 0x7fffu + (wide >> 16 & 1u)) >> 16;
    const uint32_t nan = wide >> 16 | 0x40u;
    out[i] = static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
}

constexpr int kStrip = 256;  // elements that stay in the first cache between decoding and rounding

template <class Type>
void decode_blocks(const uint8_t* in, int64_t elements, float* out) {
  constexpr WeightTypeFacts kFacts = facts(Type::kType);
  for (int64_t i = 0; i < elements; i += kFacts.block, in += kFacts.bytes)
    Type::decode(in, out + i);
}

template <class Type>
void decode_piece(const Dequantize& p) {
  constexpr WeightTypeFacts kFacts = facts(Type::kType);
  static_assert(kStrip % kFacts.block == 0);
  const auto* in = reinterpret_cast<const uint8_t*>(p.in);
  if (p.out_type == DType::kFloat32) {
    decode_blocks<Type>(in, p.elements, static_cast<float*>(p.out));
    return;
  }
  std::array<float, kStrip> strip;
  auto* out = static_cast<uint16_t*>(p.out);
  for (int64_t done = 0; done < p.elements; done += kStrip) {
    const int64_t count = std::min<int64_t>(kStrip, p.elements - done);
    decode_blocks<Type>(in + done / kFacts.block * kFacts.bytes, count, strip.data());
    round_to_bf16(strip.data(), out + done, static_cast<int>(count));
  }
}

void decode(const Dequantize& p) {
  const bool same = (p.type == WeightType::kF32 && p.out_type == DType::kFloat32) ||
                    (p.type == WeightType::kBF16 && p.out_type == DType::kBFloat16);
  if (same) {
    std::memcpy(p.out, p.in, static_cast<size_t>(p.elements) * size_of(p.out_type));
    return;
  }
  AllKnown::visit(p.type, [&]<class Type> { decode_piece<Type>(p); });
}

}  // namespace

std::string why_not(const Dequantize& p) {
  const WeightTypeFacts& type = facts(p.type);
  if (!type.real) return "type " + std::string(type.name) + " does not hold real numbers";
  if (p.elements < 0 || p.elements % type.block != 0)
    return std::to_string(p.elements) + " elements of type " + std::string(type.name) +
           " are no whole number of blocks of " + std::to_string(type.block);
  return "";
}

void run(std::span<const Dequantize> params, const ParallelFor& parallel) {
  constexpr int64_t kPiece = 1 << 18;  // elements: a megabyte of float32, some 0.2 ms
  std::vector<Dequantize> pieces;
  for (const Dequantize& p : params) {
    const std::string problem = why_not(p);
    NATSLM_CHECK(problem.empty(), "dequantize: ", problem);
    const WeightTypeFacts& type = facts(p.type);
    for (int64_t done = 0; done < p.elements; done += kPiece) {
      Dequantize piece = p;
      piece.in += done / type.block * type.bytes;
      piece.out = static_cast<std::byte*>(p.out) + static_cast<size_t>(done) * size_of(p.out_type);
      piece.elements = std::min(kPiece, p.elements - done);
      pieces.push_back(piece);
    }
  }
  parallel(std::ssize(pieces), [&](int64_t task, int) { decode(pieces[task]); });
}

}  // namespace natslm::kernels::cpu
