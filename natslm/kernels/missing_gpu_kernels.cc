// The cells of the GPU grid (docs/architecture.md) that have no kernel yet: CMake defines one name
// for each file that is not there. Callers then take the portable backend.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/checks.h"

namespace natslm::kernels {

#define NATSLM_MISSING(backend, Params)                         \
  namespace backend {                                           \
  std::string_view why_not(const Params&) {                     \
    return #backend " has no kernel for " #Params;              \
  }                                                             \
  size_t workspace_bytes(const Params&) {                       \
    return 0;                                                   \
  }                                                             \
  void run(const Params&, CUstream_st*) {                       \
    fail("attention: " #backend " has no kernel for " #Params); \
  }                                                             \
  }

#ifdef NATSLM_NO_CUDA_ATTENTION_FORWARD
NATSLM_MISSING(cuda, AttentionForward)
#endif
#ifdef NATSLM_NO_SM90_ATTENTION_FORWARD
NATSLM_MISSING(sm90, AttentionForward)
NATSLM_MISSING(sm90_short, AttentionForward)
NATSLM_MISSING(sm90_whole, AttentionForward)
#endif
#ifdef NATSLM_NO_CUDA_ATTENTION_BACKWARD
NATSLM_MISSING(cuda, AttentionBackward)
#endif
#ifdef NATSLM_NO_SM90_ATTENTION_BACKWARD
NATSLM_MISSING(sm90, AttentionBackward)
NATSLM_MISSING(sm90_short, AttentionBackward)
#endif

#undef NATSLM_MISSING

}  // namespace natslm::kernels
