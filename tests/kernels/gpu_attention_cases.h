// The problems that the GPU backends of attention are tested with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "tests/support/attention_case.h"
#include "tests/support/device_attention.h"

namespace natslm::test {

struct CaseWithOptions {
  AttentionCase problem;
  BackwardOptions options;
};

// One head of bf16 with a window of 16; its seed is to be set.
AttentionCase simple_case(const char* name, Lifetimes lifetimes, int tokens, int head_dim);

// From what any kernel gets right first to all features together.
std::vector<CaseWithOptions> smoke_cases();
// One axis at a time to its ends.
std::vector<CaseWithOptions> corners();
// Around what the kernels for short texts list, cut and pad.
std::vector<CaseWithOptions> short_texts();
// A small problem with anything in it, which the seed alone decides.
CaseWithOptions random_problem(uint64_t seed);

}  // namespace natslm::test
