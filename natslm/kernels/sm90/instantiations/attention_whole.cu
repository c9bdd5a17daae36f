// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/attention_whole.cuh"

namespace natslm::kernels::sm90 {

template void launch_attention_whole<64, 64, 2>(const WholeArguments&, int, CUstream_st*);
template void launch_attention_whole<64, 64, 4>(const WholeArguments&, int, CUstream_st*);
template void launch_attention_whole<64, 128, 1>(const WholeArguments&, int, CUstream_st*);
template void launch_attention_whole<128, 64, 2>(const WholeArguments&, int, CUstream_st*);
template void launch_attention_whole<128, 128, 1>(const WholeArguments&, int, CUstream_st*);
template void launch_attention_whole<128, 192, 1>(const WholeArguments&, int, CUstream_st*);

}  // namespace natslm::kernels::sm90
