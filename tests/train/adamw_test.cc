// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/adamw.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "natslm/base/error.h"
#include "natslm/train/schedule.h"

namespace natslm::train {
namespace {

// The paper's formula for one number, in double.
struct Scalar {
  double value, mean = 0, square = 0;
  void step(double gradient, double lr, const AdamWOptions& o, double decay, int t) {
    value -= lr * decay * value;
    mean = o.beta1 * mean + (1 - o.beta1) * gradient;
    square = o.beta2 * square + (1 - o.beta2) * gradient * gradient;
    const double m = mean / (1 - std::pow(o.beta1, t)), v = square / (1 - std::pow(o.beta2, t));
    value -= lr * m / (std::sqrt(v) + o.epsilon);
  }
};

at::Tensor parameter(at::IntArrayRef shape) {
  return at::randn(shape).set_requires_grad(true);
}

TEST(AdamW, FollowsTheFormulaAndDecaysMatricesOnly) {
  // Sizes around the widths of vector registers and the grain of threads.
  const models::NamedTensors parameters = {{"matrix", parameter({33, 31})},
                                           {"vector", parameter({17})},
                                           {"large", parameter({300, 257})},
                                           {"scalar", parameter({})}};
  const AdamWOptions options;
  AdamW optimizer(parameters, options);
  std::vector<std::vector<Scalar>> expected;
  for (const auto& [name, p] : parameters) {
    expected.emplace_back();
    for (int64_t i = 0; i < p.numel(); ++i)
      expected.back().push_back({p.detach().view({-1})[i].item<double>()});
  }
  for (int t = 1; t <= 20; ++t) {
    const double lr = 1e-2 / t;
    for (size_t k = 0; k < parameters.size(); ++k) {
      const at::Tensor& p = parameters[k].second;
      const at::Tensor gradient = at::randn(p.sizes()).mul_(std::pow(10.0, t % 5 - 3));
      p.mutable_grad() = gradient;
      const auto* g = gradient.const_data_ptr<float>();
      for (size_t i = 0; i < expected[k].size(); ++i)
        expected[k][i].step(g[i], lr, options, p.dim() >= 2 ? options.decay : 0, t);
    }
    optimizer.step(lr);
  }
  EXPECT_EQ(optimizer.steps(), 20);
  for (size_t k = 0; k < parameters.size(); ++k) {
    const auto* p = parameters[k].second.const_data_ptr<float>();
    for (size_t i = 0; i < expected[k].size(); ++i) {
      // 20 updates of at most 1e-2, each rounded a few times in float.
      const double tolerance = 20 * 4e-7 * std::max(1.0, std::abs(expected[k][i].value));
      ASSERT_NEAR(p[i], expected[k][i].value, tolerance) << parameters[k].first << " [" << i << "]";
    }
  }
}

TEST(AdamW, DividingTheGradientsIsTheSameAsSmallerGradients) {
  const at::Tensor a = parameter({5, 7}), b = a.detach().clone().set_requires_grad(true);
  AdamW first({{"a", a}}, {}), second({{"b", b}}, {});
  const at::Tensor gradient = at::randn({5, 7});
  a.mutable_grad() = gradient.mul(0.25);
  b.mutable_grad() = gradient.clone();
  first.step(0.1);
  second.step(0.1, 4);
  EXPECT_TRUE(at::equal(a, b));
}

TEST(AdamW, AParameterMayLearnFasterThanTheOthers) {
  const at::Tensor slow = parameter({4, 3}), fast = slow.detach().clone().set_requires_grad(true),
                   reference = slow.detach().clone().set_requires_grad(true);
  AdamW one({{"slow", slow}, {"fast", fast}}, {},
            [](std::string_view name) { return name == "fast" ? 3.0 : 1.0; });
  AdamW three({{"reference", reference}}, {});
  for (int i = 0; i < 3; ++i) {
    const at::Tensor gradient = at::randn({4, 3});
    for (const at::Tensor& p : {slow, fast, reference}) p.mutable_grad() = gradient.clone();
    one.step(0.01);
    three.step(0.03);
  }
  EXPECT_TRUE(at::equal(fast, reference));
  EXPECT_FALSE(at::equal(slow, reference));
}

TEST(AdamW, AParameterWithoutGradientIsLeftAlone) {
  const at::Tensor used = parameter({3, 3}), unused = parameter({3, 3});
  const at::Tensor before = unused.detach().clone();
  AdamW optimizer({{"used", used}, {"unused", unused}}, {});
  used.mutable_grad() = at::full({3, 3}, 1.0f);
  optimizer.step(0.1);
  EXPECT_TRUE(at::equal(unused.detach(), before));
  optimizer.zero_gradients();
  EXPECT_FALSE(used.grad().defined());
}

TEST(AdamW, AStateThatIsPutBackContinuesBitForBit) {
  const at::Tensor a = parameter({4, 4});
  AdamW one({{"w", a}}, {});
  for (int i = 0; i < 3; ++i) {
    a.mutable_grad() = at::randn({4, 4});
    one.step(0.01);
  }
  const at::Tensor b = a.detach().clone().set_requires_grad(true);
  AdamW two({{"w", b}}, {});
  for (size_t i = 0; i < one.state().size(); ++i) {
    EXPECT_EQ(two.state()[i].first, one.state()[i].first);
    at::Tensor(two.state()[i].second).copy_(one.state()[i].second);
  }
  two.set_steps(one.steps());
  const at::Tensor gradient = at::randn({4, 4});
  a.mutable_grad() = gradient.clone();
  b.mutable_grad() = gradient.clone();
  one.step(0.01);
  two.step(0.01);
  EXPECT_TRUE(at::equal(a, b));
}

TEST(AdamW, RefusesParametersThatAreNotFloat32) {
  EXPECT_THROW(AdamW({{"w", at::zeros({2, 2}, at::kBFloat16)}}, {}), Error);
}

TEST(GradientNorm, IsTheLengthOfAllGradientsTogether) {
  const at::Tensor a = parameter({2}), b = parameter({1, 2}), c = parameter({3});
  a.mutable_grad() = at::full({2}, 3.0f);
  b.mutable_grad() = at::full({1, 2}, 4.0f);
  EXPECT_NEAR(gradient_norm({{"a", a}, {"b", b}, {"c", c}}), std::sqrt(50.0), 1e-6);
  EXPECT_EQ(gradient_norm({{"c", c}}), 0);
}

TEST(FindNonFinite, NamesTheFirstValueThenTheFirstGradient) {
  const at::Tensor a = parameter({2}), b = parameter({3});
  const models::NamedTensors all = {{"a", a}, {"b", b}};
  EXPECT_FALSE(find_non_finite(all));
  a.mutable_grad() = at::full({2}, std::numeric_limits<float>::infinity());
  ASSERT_TRUE(find_non_finite(all));
  EXPECT_EQ(find_non_finite(all)->name, "a");
  EXPECT_TRUE(find_non_finite(all)->is_gradient);
  b.detach()[1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(find_non_finite(all)->name, "b");
  EXPECT_FALSE(find_non_finite(all)->is_gradient);
}

TEST(Schedule, RisesInALineThenFallsInHalfACosine) {
  EXPECT_DOUBLE_EQ(schedule(0, 1000, 100, 0.1), 0.01);
  EXPECT_DOUBLE_EQ(schedule(49, 1000, 100, 0.1), 0.5);
  EXPECT_DOUBLE_EQ(schedule(99, 1000, 100, 0.1), 1.0);
  EXPECT_DOUBLE_EQ(schedule(100, 1000, 100, 0.1), 1.0);
  EXPECT_NEAR(schedule(550, 1000, 100, 0.1), 0.55, 1e-12);
  EXPECT_NEAR(schedule(1000, 1000, 100, 0.1), 0.1, 1e-12);
  for (int64_t step = 101; step < 1000; ++step)
    ASSERT_LT(schedule(step, 1000, 100, 0.1), schedule(step - 1, 1000, 100, 0.1));
}

TEST(Schedule, WorksWithoutWarmUpAndWithNothingButWarmUp) {
  EXPECT_DOUBLE_EQ(schedule(0, 10, 0, 0.1), 1.0);
  EXPECT_DOUBLE_EQ(schedule(4, 5, 10, 0.1), 0.5);
  EXPECT_DOUBLE_EQ(schedule(0, 1, 0, 0.1), 1.0);
}

}  // namespace
}  // namespace natslm::train
