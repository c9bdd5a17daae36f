// Tensor maps: what the bulk tensor copy engine (TMA) knows of an array in device memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

namespace natslm::kernels::sm90 {

// One axis of a bfloat16 array, innermost first.
struct MapAxis {
  int64_t size;    // elements along the axis, >= 1
  int64_t stride;  // elements between neighbours: 1 on the innermost axis; elsewhere a positive
                   // multiple of 8, or anything where size is 1
  int32_t box;     // elements that one copy moves, 1..256; 64 on the innermost axis
};

// Copies through the map swizzle rows of 128 bytes (hopper.cuh) and read 0 outside the array.
// `base` is device memory, 16-byte aligned; 2 to 5 axes. Throws natslm::Error where the driver
// refuses.
CUtensorMap make_tensor_map(const void* base, std::initializer_list<MapAxis> axes);

}  // namespace natslm::kernels::sm90
