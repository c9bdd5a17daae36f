// Contract: weights as a file holds them (plain or quantised, natslm/base/weight_type.h) to float32
// or bf16. Float32 results are the bits of the published formulas (the `gguf` Python package), NaNs
// aside; bf16 is that, rounded once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "natslm/base/dtype.h"
#include "natslm/base/parallel.h"
#include "natslm/base/weight_type.h"

namespace natslm::kernels {

struct Dequantize {
  WeightType type = WeightType::kF32;  // one that holds real numbers
  const std::byte* in = nullptr;       // [elements / block] blocks; any alignment
  int64_t elements = 0;                // a multiple of the type's block
  void* out = nullptr;                 // [elements] of out_type
  DType out_type = DType::kFloat32;
};

namespace cpu {
std::string why_not(const Dequantize& params);  // "" means supported
// All of them, split into pieces that keep every worker busy to the end. Throws Error with why_not.
void run(std::span<const Dequantize> params, const ParallelFor& parallel);
}  // namespace cpu

}  // namespace natslm::kernels
