// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/sm90/attention_backward_keys.cuh"
#include "natslm/kernels/sm90/attention_backward_queries.cuh"
#include "natslm/kernels/sm90/role_sums.cuh"

namespace natslm::kernels::sm90 {

template int32_t keys_of_key_gradient<128>();
template int32_t keys_of_role_sums<128>();
template void launch_key_gradient<128>(const KeyParallelArguments&, int, CUstream_st*);
template void launch_role_sums<128>(const KeyParallelArguments&, int, CUstream_st*);
template void launch_query_gradient<128>(const QueryGradientArguments&, int, CUstream_st*);

}  // namespace natslm::kernels::sm90
