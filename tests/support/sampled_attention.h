// What a few queries and keys of a long problem must give: a full double-precision reference of
// 65,536 tokens would be 18 TFLOP.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "natslm/base/parallel.h"
#include "tests/support/device_attention.h"

namespace natslm::test {

// `positions` of every head. out and lse of these queries.
std::vector<Expected> sampled_forward(const DeviceProblem& problem,
                                      const std::vector<int32_t>& positions,
                                      const ParallelFor& parallel);
// mass of these keys, dq of these queries, dk, dv and role_sums of these keys, all from the out and
// lse of `forward`.
std::vector<Expected> sampled_backward(const DeviceProblem& problem, const ForwardOutputs& forward,
                                       const std::vector<int32_t>& positions,
                                       const ParallelFor& parallel);

// The elements of `values` [blocks, tokens, columns] at these positions.
std::vector<double> pick(const std::vector<double>& values, int tokens, int columns,
                         const std::vector<int32_t>& positions);

}  // namespace natslm::test
