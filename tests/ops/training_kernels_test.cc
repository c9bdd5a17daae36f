// The fused kernels of a training pass against their definitions in double, on the device that this
// binary is built for. Inputs are numbers of the type under test, so what is allowed is one
// rounding of each output and the rounding of sums in float32. SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/training_kernels.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "natslm/base/error.h"

namespace natslm::ops {
namespace {

using at::Tensor;

const c10::Device kDevice(NATSLM_TEST_DEVICE);

class TrainingKernels : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    if (kDevice.is_cuda() && !at::hasCUDA())
      GTEST_SKIP() << "NOT TESTED: there is no GPU, or this build has no CUDA code";
  }

  at::ScalarType type() const { return GetParam(); }
  // Random numbers of the type under test, on the device.
  Tensor random(at::IntArrayRef shape, double scale = 1) const {
    return (at::randn(shape) * scale).to(type()).to(kDevice);
  }
  Tensor random_float(at::IntArrayRef shape) const { return at::randn(shape).to(kDevice); }

  // `result` is the rounding of `truth` (double, on the CPU) to its own type, up to `slack` of the
  // largest entry for sums in float32.
  static void expect_rounded(const Tensor& result, const Tensor& truth, double slack = 3e-6) {
    ASSERT_EQ(result.sizes(), truth.sizes());
    const double rounding = result.scalar_type() == at::kBFloat16 ? std::exp2(-8) : 1e-6;
    const Tensor off = (result.cpu().to(at::kDouble) - truth).abs(),
                 allowed = truth.abs() * rounding + slack * truth.abs().max();
    const double worst = (off - allowed).max().item<double>();
    EXPECT_LE(worst, 0) << "largest entry " << truth.abs().max().item<double>();
    EXPECT_FALSE(at::isnan(off).any().item<bool>());
  }
  static Tensor wide(const Tensor& x) { return x.detach().cpu().to(at::kDouble); }
  static Tensor leaf(const Tensor& x) { return wide(x).requires_grad_(true); }
};

// Widths around the ways a row is spread over threads.
constexpr int64_t kWidths[] = {8,    96,   128,  256,  264,  384,  512, 768,
                               1000, 1024, 1536, 2048, 3072, 4096, 8192};

TEST_P(TrainingKernels, NormIsTheDefinitionForwardAndBack) {
  for (const int64_t width : kWidths) {
    for (const bool centered : {true, false}) {
      for (const bool with_branch : {true, false}) {
        const int64_t rows = width > 2048 ? 5 : 13;
        SCOPED_TRACE(testing::Message()
                     << width << " centered " << centered << " branch " << with_branch);
        const NormOptions options{.epsilon = 1e-3, .centered = centered};
        const Tensor x = random_float({rows, width}), weight = random_float({width});
        const Tensor branch = with_branch ? random({rows, width}) : Tensor();
        const Normed out = norm(x, branch, weight, options, type());

        // From the sum as it was rounded to float32: that is what the pass back reads.
        const Tensor sum = leaf(out.sum), w = leaf(weight);
        if (with_branch) expect_rounded(out.sum, wide(x) + wide(branch));
        const Tensor mean = centered ? sum.mean(1, true) : at::zeros_like(sum.mean(1, true));
        const Tensor rstd = at::rsqrt((sum - mean).square().mean(1, true) + options.epsilon);
        const Tensor y = (sum - mean) * rstd * w;
        expect_rounded(out.y, y.detach());
        expect_rounded(out.mean, mean.detach().squeeze(1));
        expect_rounded(out.rstd, rstd.detach().squeeze(1));

        const Tensor dy = random({rows, width});
        y.backward(wide(dy));
        for (const bool add : {false, true}) {
          const Tensor dx = random_float({rows, width});
          const Tensor expected = sum.grad() + (add ? wide(dx) : at::zeros_like(sum.grad()));
          const Tensor dweight = random_float({width});
          const Tensor expected_dweight =
              w.grad() + (add ? wide(dweight) : at::zeros_like(w.grad()));
          const Tensor dbranch =
              norm_backward(out, weight, options, dy, add ? dx : Tensor(), dx, dweight, add);
          expect_rounded(dx, expected, 1e-5);
          expect_rounded(dbranch, expected, 1e-5);
          expect_rounded(dweight, expected_dweight, 1e-5);
        }
      }
    }
  }
}

TEST_P(TrainingKernels, NormOfManyRowsAddsUpTheWeightsGradient) {
  // More rows than blocks walk over at once.
  const int64_t rows = 5000, width = 768;
  const Tensor x = random_float({rows, width}), weight = random_float({width}),
               dy = random({rows, width});
  const Normed out = norm(x, {}, weight, {}, type());
  Tensor dx = at::empty({rows, width}, x.options()), dweight = at::empty({width}, x.options());
  norm_backward(out, weight, {}, dy, {}, dx, dweight, false);
  const Tensor truth =
      (wide(dy) * (wide(x) - wide(out.mean).unsqueeze(1)) * wide(out.rstd).unsqueeze(1)).sum(0);
  expect_rounded(dweight, truth, 1e-5);
  Tensor again = at::empty({width}, x.options());
  norm_backward(out, weight, {}, dy, {}, dx, again, false);
  EXPECT_TRUE(at::equal(again, dweight));
}

TEST_P(TrainingKernels, GeluIsTheDefinitionForwardAndBack) {
  for (const int64_t count : {8, 1000, 4096, 100000}) {
    const Tensor x = random({count}, 3), dy = random({count});
    const Tensor truth_x = leaf(x), truth = at::gelu(truth_x, "none");
    expect_rounded(ops::gelu(x), truth.detach());
    truth.backward(wide(dy));
    const Tensor dx = dy.clone();
    const Tensor y = gelu_backward_(x, dx, true);
    expect_rounded(dx, truth_x.grad());
    EXPECT_TRUE(at::equal(y, ops::gelu(x)));
    EXPECT_FALSE(gelu_backward_(x, dx, false).defined());
  }
}

TEST_P(TrainingKernels, GatedActivationsAreTheirDefinitionsForwardAndBack) {
  using enum kernels::GateActivation;
  for (const auto activation : {kSilu, kGelu, kGeluTanh}) {
    for (const int64_t hidden : {8, 24, 1536, 8192}) {
      for (const int64_t rows : {1, 37}) {
        SCOPED_TRACE(testing::Message() << static_cast<int>(activation) << " hidden " << hidden);
        const Tensor x = random({rows, 2 * hidden}, 3), dy = random({rows, hidden});
        const Tensor leaf_x = leaf(x), gate = leaf_x.narrow(1, 0, hidden);
        const Tensor activated = activation == kSilu   ? at::silu(gate)
                                 : activation == kGelu ? at::gelu(gate, "none")
                                                       : at::gelu(gate, "tanh");
        const Tensor truth = activated * leaf_x.narrow(1, hidden, hidden);
        expect_rounded(gated(x, activation), truth.detach());
        truth.backward(wide(dy));
        expect_rounded(gated_backward(x, dy, activation), leaf_x.grad());
      }
    }
  }
}

TEST_P(TrainingKernels, RotationIsTheDefinitionAndItsTransposeBack) {
  for (const int64_t d : {16, 64, 128}) {
    for (const int64_t rest : {0, 5, 9}) {
      const int64_t b = 2, t = 37, hq = 3, hkv = 2, heads = (hq + 2 * hkv) * d;
      const int64_t columns = (heads + rest + 7) / 8 * 8;
      SCOPED_TRACE(testing::Message() << "D " << d << " rest " << rest);
      const Tensor angle = at::randn({t + 3, d / 2}), cos = angle.cos().to(kDevice),
                   sin = angle.sin().to(kDevice);
      const Tensor fused = random({b, t, columns});
      const Tensor before = wide(fused);
      const auto turned = [&](const Tensor& x, double sign) {  // [B, T, H, D]
        const Tensor c = wide(cos).narrow(0, 0, t).view({1, t, 1, d / 2}),
                     s = sign * wide(sin).narrow(0, 0, t).view({1, t, 1, d / 2});
        const Tensor a = x.narrow(3, 0, d / 2), e = x.narrow(3, d / 2, d / 2);
        return at::cat({a * c - e * s, e * c + a * s}, 3);
      };
      rotate_heads_(fused, hq + hkv, cos, sin);
      const int64_t turning = (hq + hkv) * d;
      expect_rounded(
          fused.narrow(2, 0, turning),
          turned(before.narrow(2, 0, turning).view({b, t, hq + hkv, d}), 1).view({b, t, turning}));
      EXPECT_TRUE(at::equal(wide(fused.narrow(2, turning, columns - turning)),
                            before.narrow(2, turning, columns - turning)));

      // Gradients as attention may leave them: by heads, by tokens.
      const Tensor dq = random({b, hq, t, d}), dk = random({b, t, hkv, d}).transpose(1, 2),
                   dv = random({b, hkv, t, d});
      const Tensor drest = rest > 0 ? random_float({b, t, rest}) : Tensor();
      const Tensor dfused = rotate_heads_backward(dq, dk, dv, drest, columns, cos, sin);
      const auto flat = [&](const Tensor& x) { return x.reshape({b, t, -1}); };
      std::vector<Tensor> parts = {flat(turned(wide(dq).transpose(1, 2), -1)),
                                   flat(turned(wide(dk).transpose(1, 2), -1)),
                                   flat(wide(dv).transpose(1, 2))};
      if (rest > 0) parts.push_back(wide(drest));
      if (columns > heads + rest)
        parts.push_back(at::full({b, t, columns - heads - rest}, 0.0, at::kDouble));
      expect_rounded(dfused, at::cat(parts, 2));
    }
  }
}

TEST_P(TrainingKernels, CrossEntropyIsTheDefinitionWithItsGradient) {
  for (const int64_t vocabulary : {2, 13, 500, 4096, 4097, 50257}) {
    const int64_t rows = 7, columns = (vocabulary + 63) / 64 * 64;
    SCOPED_TRACE(testing::Message() << vocabulary);
    Tensor logits = random({rows, columns}, 4);
    // What is beyond the vocabulary must not matter.
    logits.narrow(1, vocabulary, columns - vocabulary).fill_(NAN);
    const Tensor targets = at::randint(vocabulary, {rows}, at::kInt);
    const Tensor x = leaf(logits.narrow(1, 0, vocabulary));
    const Tensor truth =
        -at::log_softmax(x, 1).gather(1, targets.to(at::kLong).unsqueeze(1)).squeeze(1);
    const Tensor before = logits.clone();
    const Tensor loss = cross_entropy_rows_(logits, targets.to(kDevice), vocabulary, false, 1);
    expect_rounded(loss, truth.detach(), 1e-6);
    EXPECT_TRUE(at::equal(logits.narrow(1, 0, vocabulary), before.narrow(1, 0, vocabulary)));
    EXPECT_TRUE(
        at::equal(cross_entropy_rows_(logits, targets.to(kDevice), vocabulary, true, 0.25), loss));
    truth.sum().backward();
    // The probability is rounded to float before 1 is taken from the target's.
    expect_rounded(logits.narrow(1, 0, vocabulary), 0.25 * x.grad(), 2.5e-7);
    EXPECT_EQ(logits.narrow(1, vocabulary, columns - vocabulary).abs().sum().item<double>(), 0);
  }
}

TEST_P(TrainingKernels, CrossEntropyWeighsEachRowsGradientAndNoLoss) {
  const int64_t rows = 5, vocabulary = 96;
  const Tensor logits = random({rows, vocabulary}, 4), same = logits.clone();
  const Tensor targets = at::randint(vocabulary, {rows}, at::kInt);
  Tensor weights = random_float({rows});
  weights.narrow(0, 2, 1).zero_();
  const Tensor x = leaf(logits);
  const Tensor truth =
      -at::log_softmax(x, 1).gather(1, targets.to(at::kLong).unsqueeze(1)).squeeze(1);
  const Tensor loss =
      cross_entropy_rows_(logits, targets.to(kDevice), vocabulary, true, 0.5, weights);
  EXPECT_TRUE(
      at::equal(loss, cross_entropy_rows_(same, targets.to(kDevice), vocabulary, false, 1)));
  (truth * wide(weights)).sum().backward();
  expect_rounded(logits, 0.5 * x.grad(), 2.5e-7);
}

TEST_P(TrainingKernels, CrossEntropyOfATargetOutsideTheVocabularyIsNotANumber) {
  for (const int target : {-1, 13, 64, 1 << 30}) {
    Tensor logits = random({1, 64});
    const Tensor targets = at::full({1}, target, at::kInt).to(kDevice);
    EXPECT_TRUE(std::isnan(cross_entropy_rows_(logits, targets, 13, true, 1).item<float>()));
  }
}

TEST_P(TrainingKernels, WhatDoesNotFitIsNamed) {
  const Tensor x = random_float({4, 16});
  EXPECT_THROW(norm(x, {}, random_float({8}), {}, type()), Error);
  EXPECT_THROW(norm(x, random({4, 8}), random_float({16}), {}, type()), Error);
  EXPECT_THROW(
      cross_entropy_rows_(random({4, 16}), at::full({3}, 0, at::kInt).to(kDevice), 16, true, 1),
      Error);
  EXPECT_THROW(cross_entropy_rows_(random({4, 16}), at::full({4}, 0, at::kInt).to(kDevice), 16,
                                   true, 1, random_float({3})),
               Error);
  EXPECT_THROW(gated(random({4, 9}), kernels::GateActivation::kSilu), Error);
  EXPECT_THROW(gated_backward(random({4, 16}), random({4, 16}), kernels::GateActivation::kSilu),
               Error);
  EXPECT_THROW(rotate_heads_(random({1, 8, 64}), 2, random_float({4, 16}), random_float({4, 16})),
               Error);
}

std::vector<at::ScalarType> types() {
  if (kDevice.is_cuda()) return {at::kBFloat16};
  return {at::kFloat, at::kBFloat16};
}
INSTANTIATE_TEST_SUITE_P(Types, TrainingKernels, ::testing::ValuesIn(types()),
                         [](const auto& type) { return c10::toString(type.param); });

}  // namespace
}  // namespace natslm::ops
