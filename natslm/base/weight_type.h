// The element types of weight files, safetensors and GGUF alike: plain ones, and quantised ones
// that hold a block of neighbouring elements of a row in a few bytes. kernels/dequantize.h turns
// those that hold real numbers into float32 or bf16.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace natslm {

enum class WeightType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF64,
  // Readable as bytes only.
  kI8,
  kI16,
  kI32,
  kI64,
  kU8,
  kU16,
  kU32,
  kU64,
  kBool,
  kF8E4M3,
  kF8E5M2,
  // Quantised: GGUF only.
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIQ1S,
  kIQ1M,
  kIQ2XXS,
  kIQ2XS,
  kIQ2S,
  kIQ3XXS,
  kIQ3S,
  kIQ4NL,
  kIQ4XS,
  kMXFP4,
};

struct WeightTypeFacts {
  WeightType type;
  std::string_view name;  // as both formats write it
  uint16_t block;         // elements that are stored together; a row is a multiple of it
  uint16_t bytes;         // of a block
  int16_t gguf;           // number of the type in a GGUF file; -1: not in that format
  bool safetensors;       // whether that format has it
  bool real;              // whether kernels/dequantize.h reads it
};

// In the order of the enumeration.
inline constexpr std::array<WeightTypeFacts, 35> kWeightTypes = {{
    {WeightType::kF32, "F32", 1, 4, 0, true, true},
    {WeightType::kF16, "F16", 1, 2, 1, true, true},
    {WeightType::kBF16, "BF16", 1, 2, 30, true, true},
    {WeightType::kF64, "F64", 1, 8, 28, true, true},
    {WeightType::kI8, "I8", 1, 1, 24, true, false},
    {WeightType::kI16, "I16", 1, 2, 25, true, false},
    {WeightType::kI32, "I32", 1, 4, 26, true, false},
    {WeightType::kI64, "I64", 1, 8, 27, true, false},
    {WeightType::kU8, "U8", 1, 1, -1, true, false},
    {WeightType::kU16, "U16", 1, 2, -1, true, false},
    {WeightType::kU32, "U32", 1, 4, -1, true, false},
    {WeightType::kU64, "U64", 1, 8, -1, true, false},
    {WeightType::kBool, "BOOL", 1, 1, -1, true, false},
    {WeightType::kF8E4M3, "F8_E4M3", 1, 1, -1, true, false},
    {WeightType::kF8E5M2, "F8_E5M2", 1, 1, -1, true, false},
    {WeightType::kQ4_0, "Q4_0", 32, 18, 2, false, true},
    {WeightType::kQ4_1, "Q4_1", 32, 20, 3, false, true},
    {WeightType::kQ5_0, "Q5_0", 32, 22, 6, false, true},
    {WeightType::kQ5_1, "Q5_1", 32, 24, 7, false, true},
    {WeightType::kQ8_0, "Q8_0", 32, 34, 8, false, true},
    {WeightType::kQ2K, "Q2_K", 256, 84, 10, false, true},
    {WeightType::kQ3K, "Q3_K", 256, 110, 11, false, true},
    {WeightType::kQ4K, "Q4_K", 256, 144, 12, false, true},
    {WeightType::kQ5K, "Q5_K", 256, 176, 13, false, true},
    {WeightType::kQ6K, "Q6_K", 256, 210, 14, false, true},
    {WeightType::kIQ1S, "IQ1_S", 256, 50, 19, false, true},
    {WeightType::kIQ1M, "IQ1_M", 256, 56, 29, false, true},
    {WeightType::kIQ2XXS, "IQ2_XXS", 256, 66, 16, false, true},
    {WeightType::kIQ2XS, "IQ2_XS", 256, 74, 17, false, true},
    {WeightType::kIQ2S, "IQ2_S", 256, 82, 22, false, true},
    {WeightType::kIQ3XXS, "IQ3_XXS", 256, 98, 18, false, true},
    {WeightType::kIQ3S, "IQ3_S", 256, 110, 21, false, true},
    {WeightType::kIQ4NL, "IQ4_NL", 32, 18, 20, false, true},
    {WeightType::kIQ4XS, "IQ4_XS", 256, 136, 23, false, true},
    {WeightType::kMXFP4, "MXFP4", 32, 17, 39, false, true},
}};

constexpr const WeightTypeFacts& facts(WeightType type) {
  return kWeightTypes[static_cast<size_t>(type)];
}
constexpr std::string_view name(WeightType type) {
  return facts(type).name;
}

namespace internal {
constexpr bool weight_types_are_in_order() {
  for (size_t i = 0; i < kWeightTypes.size(); ++i)
    if (static_cast<size_t>(kWeightTypes[i].type) != i) return false;
  return true;
}
static_assert(weight_types_are_in_order());
}  // namespace internal

}  // namespace natslm
