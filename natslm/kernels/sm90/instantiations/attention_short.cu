// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/short_forward.cuh"
#include "natslm/kernels/sm90/short_query_gradient.cuh"

namespace natslm::kernels::sm90 {

template void launch_short_forward<64>(const ShortForwardArguments&, CUstream_st*);
template void launch_short_forward<128>(const ShortForwardArguments&, CUstream_st*);
template void launch_short_query_gradient<64>(const ShortQueryGradientArguments&, CUstream_st*);
template void launch_short_query_gradient<128>(const ShortQueryGradientArguments&, CUstream_st*);

}  // namespace natslm::kernels::sm90
