// Names and sizes of the element types that kernels, caches and weight files know, and the bf16
// conversions (round to nearest, ties to even, as LibTorch rounds).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace natslm {

enum class DType : uint8_t { kFloat32, kBFloat16 };

constexpr size_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}
constexpr std::string_view name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : "bfloat16";
}

// Storage only: arithmetic is in float.
struct BFloat16 {
  uint16_t bits = 0;
  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t wide = std::bit_cast<uint32_t>(value);
    if ((wide & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((wide >> 16) | 0x40u);  // a NaN stays one
    } else {
      bits = static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
    }
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};
static_assert(sizeof(BFloat16) == 2);

}  // namespace natslm
