// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/tensor_map.h"

#include <cudaTypedefs.h>

#include "natslm/kernels/cuda/check.h"

namespace natslm::kernels::sm90 {
namespace {

constexpr int kMaxAxes = 5;
constexpr int64_t kElementBytes = 2;
constexpr int64_t kStrideUnit = 16;  // bytes

// The driver's function, found at run time: the program starts on machines without a driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    NATSLM_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                 cudaEnableDefault, &status));
    NATSLM_CHECK(status == cudaDriverEntryPointSuccess && found,
                 "this driver has no cuTensorMapEncodeTiled: the Hopper kernels need a driver of "
                 "CUDA 12 or later");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

CUtensorMap encode(const void* base, CUtensorMapDataType type, int rank, const cuuint64_t* sizes,
                   const cuuint64_t* strides, const cuuint32_t* boxes, CUtensorMapSwizzle swizzle) {
  constexpr cuuint32_t kSteps[kMaxAxes] = {1, 1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result =
      encoder()(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes, strides,
                boxes, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  NATSLM_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with CUresult ",
               static_cast<int>(result), " (rank ", rank, ", innermost size ", sizes[0],
               ", first stride ", strides[0], " bytes)");
  return map;
}

}  // namespace

CUtensorMap make_tensor_map(const void* base, std::initializer_list<MapAxis> axes) {
  NATSLM_ASSERT(axes.size() >= 2 && axes.size() <= kMaxAxes);
  cuuint64_t sizes[kMaxAxes] = {}, strides[kMaxAxes - 1] = {};
  cuuint32_t boxes[kMaxAxes] = {};
  int rank = 0;
  for (const MapAxis& axis : axes) {
    sizes[rank] = static_cast<cuuint64_t>(axis.size);
    boxes[rank] = static_cast<cuuint32_t>(axis.box);
    if (rank > 0) {
      strides[rank - 1] =
          static_cast<cuuint64_t>(axis.size > 1 ? axis.stride * kElementBytes : kStrideUnit);
    }
    ++rank;
  }
  return encode(base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, sizes, strides, boxes,
                CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace natslm::kernels::sm90
