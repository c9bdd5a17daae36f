// The GPU backends of a build without CUDA: each says so, so that no caller needs an #ifdef.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/checks.h"
#include "natslm/kernels/cross_entropy.h"
#include "natslm/kernels/fused_norm.h"
#include "natslm/kernels/gated.h"
#include "natslm/kernels/gelu.h"
#include "natslm/kernels/page_moves.h"
#include "natslm/kernels/rotary.h"

namespace natslm::kernels {
namespace {

constexpr std::string_view kNoCuda = "this build has no CUDA code; build the preset cuda-release";

}  // namespace

#define NATSLM_WITHOUT_CUDA(backend, Params)     \
  namespace backend {                            \
  std::string_view why_not(const Params&) {      \
    return kNoCuda;                              \
  }                                              \
  size_t workspace_bytes(const Params&) {        \
    return 0;                                    \
  }                                              \
  void run(const Params&, CUstream_st*) {        \
    fail("attention (" #backend "): ", kNoCuda); \
  }                                              \
  }

NATSLM_WITHOUT_CUDA(cuda, AttentionForward)
NATSLM_WITHOUT_CUDA(sm90, AttentionForward)
NATSLM_WITHOUT_CUDA(sm90_short, AttentionForward)
NATSLM_WITHOUT_CUDA(sm90_whole, AttentionForward)
NATSLM_WITHOUT_CUDA(cuda, AttentionBackward)
NATSLM_WITHOUT_CUDA(sm90, AttentionBackward)
NATSLM_WITHOUT_CUDA(sm90_short, AttentionBackward)
NATSLM_WITHOUT_CUDA(cuda, AttentionDecode)
NATSLM_WITHOUT_CUDA(sm90, AttentionDecode)

#undef NATSLM_WITHOUT_CUDA

#define NATSLM_WITHOUT_CUDA(Params)         \
  std::string_view why_not(const Params&) { \
    return kNoCuda;                         \
  }                                         \
  void run(const Params&, CUstream_st*) {   \
    fail("pages on a GPU: ", kNoCuda);      \
  }

namespace cuda {
NATSLM_WITHOUT_CUDA(PageUpdate)
NATSLM_WITHOUT_CUDA(PageMoves)
NATSLM_WITHOUT_CUDA(PageGather)
}  // namespace cuda

#undef NATSLM_WITHOUT_CUDA

#define NATSLM_WITHOUT_CUDA(kernel, Params) \
  namespace cuda {                          \
  std::string_view why_not(const Params&) { \
    return kNoCuda;                         \
  }                                         \
  void run(const Params&, CUstream_st*) {   \
    fail(kernel, ": ", kNoCuda);            \
  }                                         \
  }

NATSLM_WITHOUT_CUDA("norm", NormForward)
NATSLM_WITHOUT_CUDA("norm", NormBackward)
NATSLM_WITHOUT_CUDA("gated", GatedForward)
NATSLM_WITHOUT_CUDA("gated", GatedBackward)
NATSLM_WITHOUT_CUDA("gelu", GeluForward)
NATSLM_WITHOUT_CUDA("gelu", GeluBackward)
NATSLM_WITHOUT_CUDA("rotary", RotaryForward)
NATSLM_WITHOUT_CUDA("rotary", RotaryBackward)
NATSLM_WITHOUT_CUDA("cross entropy", CrossEntropy)

#undef NATSLM_WITHOUT_CUDA

size_t cuda::workspace_bytes(const NormBackward&) {
  return 0;
}

}  // namespace natslm::kernels
