// Every instruction set that this build and this processor have gives the plain result: the machine
// that runs the tests would otherwise only ever try its best one.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <iostream>

#include "natslm/kernels/attention_backward.h"
#include "natslm/kernels/attention_forward.h"
#include "tests/support/attention_case.h"

namespace natslm::test {
namespace {

void choose(int64_t targets) {  // 0: what the processor has
  hwy::SetSupportedTargetsForTest(targets);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(InstructionSets, AllAreAtMostTwiceAsWrongAsThePlainAttention) {
  std::vector<int64_t> targets;
  for (const int64_t target : {HWY_SSSE3, HWY_AVX2, HWY_AVX3}) {
    if ((hwy::SupportedTargets() & target) != 0) {
      targets.push_back(target);
    } else {
      std::cout << "not tried, this processor lacks it: " << hwy::TargetName(target) << "\n";
    }
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (uint64_t seed = 1001; seed <= 1025; ++seed) {
      const AttentionCase c = random_case(seed, dtype);
      AttentionInputs inputs(c);
      ForwardResult truth = run_forward(inputs, kernels::reference::run);
      const ForwardResult plain = run_forward(inputs, plain_forward);
      const ForwardResult again = run_forward(inputs, plain_forward_again);
      const BackwardResult true_slope = run_backward(inputs, truth, kernels::reference::run);
      const BackwardResult plain_slope = run_backward(inputs, truth, plain_backward);
      const BackwardResult again_slope = run_backward(inputs, truth, plain_backward_again);
      for (const int64_t target : targets) {
        SCOPED_TRACE(hwy::TargetName(target));
        choose(target);
        const ForwardResult fast = run_forward(inputs, kernels::cpu::run);
        const BackwardResult fast_slope = run_backward(inputs, truth, kernels::cpu::run);
        choose(0);
        EXPECT_EQ(compare("out", fast.out.values(), plain.out.values(), again.out.values(),
                          truth.out.values(), dtype, c),
                  "");
        const auto check = [&](const char* what, Tensor4 BackwardResult::*part) {
          EXPECT_EQ(compare(what, (fast_slope.*part).values(), (plain_slope.*part).values(),
                            (again_slope.*part).values(), (true_slope.*part).values(), dtype, c),
                    "");
        };
        check("dq", &BackwardResult::dq);
        check("dk", &BackwardResult::dk);
        check("dv", &BackwardResult::dv);
        EXPECT_EQ(
            compare("role_sums", widen(fast_slope.role_sums), widen(plain_slope.role_sums),
                    widen(again_slope.role_sums), widen(true_slope.role_sums), DType::kFloat32, c),
            "");
      }
    }
  }
}

}  // namespace
}  // namespace natslm::test
