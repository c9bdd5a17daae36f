// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/attention_forward.cuh"

namespace natslm::kernels::sm90 {

template void launch_attention_forward<128>(const ForwardArguments&, int, CUstream_st*);

}  // namespace natslm::kernels::sm90
