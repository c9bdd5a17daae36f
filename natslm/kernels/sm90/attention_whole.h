// The Hopper forward kernel that reads every key up to the query, as its host code sees it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/sm90/attention_forward.h"

namespace natslm::kernels::sm90 {

struct WholeArguments : ForwardArguments {  // of which position, runs, bounds and work are unused
  int32_t heads;                            // B * Hkv
  int32_t heads_together;                   // cuda::head_span
};

// Rows of a block: 128 or 192. Three warpgroups keep the tensor cores busier, but leave a third of
// the rows idle where 128 are all there are.
constexpr int32_t whole_rows(int32_t head_dim, int64_t rows_of_head) {
  return head_dim == 64 && rows_of_head > 128 ? 192 : 128;
}

// One block per multiprocessor, or per query tile where there are fewer.
template <int kHeadDim, int kRows>
void launch_attention_whole(const WholeArguments& arguments, int multiprocessors,
                            CUstream_st* stream);

}  // namespace natslm::kernels::sm90
