// Pieces of a block with gradients of their own against the same in double with LibTorch's, on the
// device that this binary is built for. SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/fused_layers.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>

#include "natslm/base/error.h"

namespace natslm::ops {
namespace {

using at::Tensor;

const c10::Device kDevice(NATSLM_TEST_DEVICE);
const at::ScalarType kType = kDevice.is_cuda() ? at::kBFloat16 : at::kFloat;

class FusedLayers : public ::testing::Test {
 protected:
  void SetUp() override {
    if (kDevice.is_cuda() && !at::hasCUDA())
      GTEST_SKIP() << "NOT TESTED: there is no GPU, or this build has no CUDA code";
  }
};

Tensor random(at::IntArrayRef shape, at::ScalarType type) {
  return at::randn(shape).to(type).to(kDevice);
}
Tensor wide(const Tensor& x) {
  return x.detach().cpu().to(at::kDouble);
}
Tensor wide_leaf(const Tensor& x) {
  return wide(x).requires_grad_(true);
}
Tensor leaf(const Tensor& x) {
  return x.detach().clone().requires_grad_(true);
}

// One rounding to the type, and what roundings before it come to.
void expect_close(const Tensor& result, const Tensor& truth) {
  ASSERT_EQ(result.sizes(), truth.sizes());
  const double rounding = kType == at::kBFloat16 ? std::exp2(-6) : 1e-5;
  const double worst = (wide(result) - truth).abs().max().item<double>();
  EXPECT_LE(worst, rounding * truth.abs().max().item<double>());
}

TEST_F(FusedLayers, AddAndNormWithTheGradientsOfBothResults) {
  for (const bool centered : {true, false}) {
    for (const bool with_branch : {true, false}) {
      for (const int reads : {1, 2, 3}) {  // bit 0: sum, bit 1: y
        SCOPED_TRACE(testing::Message()
                     << "centered " << centered << " branch " << with_branch << " reads " << reads);
        const Tensor x = leaf(random({2, 5, 64}, at::kFloat)),
                     branch = with_branch ? leaf(random({2, 5, 64}, kType)) : Tensor();
        const Tensor weight = random({64}, at::kFloat), of_sum = random({2, 5, 64}, at::kFloat),
                     of_y = random({2, 5, 64}, kType);
        const SumAndNorm r = add_norm(x, branch, weight, {1e-3, centered}, kType);
        EXPECT_EQ(r.y.scalar_type(), kType);

        const Tensor wx = wide_leaf(x), wb = with_branch ? wide_leaf(branch) : Tensor();
        const Tensor sum = with_branch ? wx + wb : wx * 1;
        const Tensor mean = centered ? sum.mean(-1, true) : at::zeros_like(sum.mean(-1, true));
        const Tensor y =
            (sum - mean) * at::rsqrt((sum - mean).square().mean(-1, true) + 1e-3) * wide(weight);
        expect_close(r.sum, sum.detach());
        expect_close(r.y, y.detach());

        Tensor loss, truth;
        const auto add = [](Tensor& to, const Tensor& part) {
          to = to.defined() ? to + part : part;
        };
        if (reads & 1) {
          add(loss, (r.sum * of_sum).sum());
          add(truth, (sum * wide(of_sum)).sum());
        }
        if (reads & 2) {
          add(loss, (r.y * of_y).sum().to(at::kFloat));
          add(truth, (y * wide(of_y)).sum());
        }
        loss.backward();
        truth.backward();
        expect_close(x.grad(), wx.grad());
        if (with_branch) expect_close(branch.grad(), wb.grad());
      }
    }
  }
}

TEST_F(FusedLayers, AddAndNormLeavesItsInputsAlone) {
  const Tensor x = random({3, 16}, at::kFloat), branch = random({3, 16}, kType),
               weight = random({16}, at::kFloat), before = x.clone(),
               branch_before = branch.clone();
  add_norm(x, branch, weight, {}, kType);
  add_norm(x, {}, weight, {}, kType);
  EXPECT_TRUE(at::equal(x, before));
  EXPECT_TRUE(at::equal(branch, branch_before));
}

TEST_F(FusedLayers, AddAndNormRefusesAWeightThatLearns) {
  EXPECT_THROW(add_norm(random({3, 16}, at::kFloat), {}, leaf(random({16}, at::kFloat)), {}, kType),
               Error);
}

TEST_F(FusedLayers, TurnHeadsInThePlaceOfTheirProjection) {
  const int64_t b = 2, t = 11, hq = 4, hkv = 2, d = 32, columns = (hq + 2 * hkv) * d;
  const Tensor angle = at::randn({t + 2, d / 2}), cos = angle.cos().to(kDevice),
               sin = angle.sin().to(kDevice);
  const Tensor in = leaf(random({b, t, columns}, kType));
  const Tensor fused = in * 1;  // not a leaf: it is written to
  const TurnedHeads heads = turn_heads(fused, hq, hkv, cos, sin);

  const Tensor w = wide_leaf(in);
  const auto part = [&](int64_t first, int64_t n) {
    return w.narrow(2, first * d, n * d).view({b, t, n, d}).transpose(1, 2);
  };
  const auto turned = [&](const Tensor& x) {
    const Tensor c = wide(cos).narrow(0, 0, t), s = wide(sin).narrow(0, 0, t),
                 a = x.narrow(3, 0, d / 2), e = x.narrow(3, d / 2, d / 2);
    return at::cat({a * c - e * s, e * c + a * s}, 3);
  };
  const Tensor q = turned(part(0, hq)), k = turned(part(hq, hkv)), v = part(hq + hkv, hkv);
  expect_close(heads.q, q.detach());
  expect_close(heads.k, k.detach());
  expect_close(heads.v, v.detach());

  const Tensor of_q = random({b, hq, t, d}, kType), of_k = random({b, hkv, t, d}, kType),
               of_v = random({b, hkv, t, d}, kType);
  ((heads.q * of_q).sum() + (heads.k * of_k).sum() + (heads.v * of_v).sum()).backward();
  ((q * wide(of_q)).sum() + (k * wide(of_k)).sum() + (v * wide(of_v)).sum()).backward();
  expect_close(in.grad(), w.grad());
}

TEST_F(FusedLayers, TurnHeadsRefusesColumnsThatAreNoHeads) {
  const Tensor table = random({8, 16}, at::kFloat);
  EXPECT_THROW(turn_heads(random({1, 8, 4 * 32 + 8}, kType), 2, 1, table, table), Error);
}

TEST_F(FusedLayers, GatedActivationWithItsGradient) {
  const Tensor x = leaf(random({3, 7, 48}, kType)), of_y = random({3, 7, 24}, kType);
  const Tensor y = gated_activation(x, kernels::GateActivation::kSilu);
  const Tensor w = wide_leaf(x), truth = at::silu(w.narrow(2, 0, 24)) * w.narrow(2, 24, 24);
  expect_close(y, truth.detach());
  (y * of_y).sum().backward();
  (truth * wide(of_y)).sum().backward();
  expect_close(x.grad(), w.grad());
}

}  // namespace
}  // namespace natslm::ops
