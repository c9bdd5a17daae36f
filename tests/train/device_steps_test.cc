// The steps that a GPU takes, on the CPU in float32: the same trajectory as autograd's.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/device_steps.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/scalar_tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "natslm/models/models.h"
#include "natslm/train/device_budget.h"
#include "tests/train/tiny_run.h"

namespace natslm::train {
namespace {

models::Config small_config(roles::RoleSet set) {
  models::Config config;
  config.layers = 2;
  config.width = 32;
  config.q_heads = config.kv_heads = 2;
  config.head_dim = 16;
  config.hidden = 64;
  config.vocabulary = TinyModel::kVocabulary;
  config.context = 32;
  config.initial_deviation = 0.1;
  config.roles = {.set = set, .window = 3, .chunk = 1};
  return config;
}

Options small_options() {
  Options o = tiny_options();
  o.context = 24;
  o.batch = 8;
  return o;
}

class DeviceStepsOnTheCpu : public ::testing::Test {
 protected:
  DeviceStepsOnTheCpu() { at::set_num_threads(1); }

  data::TokenDataset dataset{tiny_text(6000), TinyModel::kVocabulary, 5};

  // Both ways, step by step.
  void expect_same_trajectory(const Options& options, roles::RoleSet set) {
    const auto a = models::make_model(small_config(set), 3),
               b = models::make_model(small_config(set), 3);
    const auto with_autograd = make_autograd_steps(*a, dataset, options);
    const auto on_device = make_device_steps(*b, dataset, options, {.products = at::kFloat});
    for (int64_t step = 0; step < 12; ++step) {
      with_autograd->begin(step);
      on_device->begin(step);
      const FinishedStep x = with_autograd->finish(), y = on_device->finish();
      ASSERT_FALSE(x.failed || y.failed);
      // A role that turns on the last bit would part the two; these seeds have none.
      EXPECT_NEAR(y.report.loss, x.report.loss, 2e-4) << "step " << step;
      EXPECT_NEAR(y.report.gradient_norm, x.report.gradient_norm, 2e-3 * x.report.gradient_norm);
      EXPECT_NEAR(y.report.kv_end, x.report.kv_end, 1e-5);
      EXPECT_NEAR(y.report.sampled.pairs, x.report.sampled.pairs, 1e-5);
      EXPECT_NEAR(y.report.lambda, x.report.lambda, 1e-5 * x.report.lambda);
      EXPECT_EQ(y.report.learning_rate, x.report.learning_rate);
      EXPECT_EQ(y.report.step, x.report.step);
    }
    for (size_t i = 0; i < a->parameters().size(); ++i) {
      const auto& [name, p] = a->parameters()[i];
      const double off = (p - b->parameters()[i].second).abs().max().item<double>();
      EXPECT_LE(off, 1e-3) << name;
    }
    EXPECT_NEAR(on_device->lambda(), with_autograd->lambda(), 1e-5);
  }
};

TEST_F(DeviceStepsOnTheCpu, AreAutogradsSteps) {
  expect_same_trajectory(small_options(), roles::RoleSet::kGls);
}

TEST_F(DeviceStepsOnTheCpu, AreAutogradsStepsWhenDense) {
  expect_same_trajectory(small_options(), roles::RoleSet::kDense);
}

TEST_F(DeviceStepsOnTheCpu, AreAutogradsStepsInMicroBatchesWithBiasAndRateOfTheRoles) {
  Options o = small_options();
  o.micro_batch = 2;
  o.bias_range = 1.5;
  o.role_rate = 3;
  o.end_term = true;
  o.clip = 0.05;
  expect_same_trajectory(o, roles::RoleSet::kGls);
}

TEST_F(DeviceStepsOnTheCpu, AreAutogradsStepsWhenAlternating) {
  Options o = small_options();
  o.optimize = kAlternating;
  o.kv_budget = 0;
  expect_same_trajectory(o, roles::RoleSet::kGls);
  o.micro_batch = 2;
  expect_same_trajectory(o, roles::RoleSet::kGls);
}

TEST_F(DeviceStepsOnTheCpu, AStepThatIsNotFiniteChangesNoWeight) {
  const auto model = models::make_model(small_config(roles::RoleSet::kGls), 3);
  const auto steps = make_device_steps(*model, dataset, small_options(), {.products = at::kFloat});
  steps->begin(0);
  EXPECT_FALSE(steps->finish().failed);
  const auto& [name, last] = model->parameters().back();
  const auto& [first_name, first] = model->parameters().front();
  const at::Tensor before = first.detach().clone();
  last.detach()[0] = std::numeric_limits<float>::quiet_NaN();
  steps->begin(1);
  const FinishedStep done = steps->finish();
  EXPECT_TRUE(done.failed);
  ASSERT_TRUE(done.bad);
  EXPECT_EQ(done.bad->name, name);
  EXPECT_FALSE(done.bad->is_gradient);
  EXPECT_TRUE(at::equal(first.detach(), before));
}

TEST(DeviceBudget, IsBudgetControl) {
  const roles::BudgetOptions options{.target = 0.2, .initial_lambda = 0.03, .gain = 0.1};
  roles::BudgetControl host(options);
  DeviceBudget device(options, at::kCPU);
  for (int i = 0; i < 300; ++i) {
    EXPECT_NEAR(device.lambda().item<double>(), host.lambda(), 1e-12 * host.lambda());
    const double kv_end = i < 100 ? 1.0 : i < 200 ? 0.0 : 0.19 + 0.0003 * (i - 200);
    host.observe(kv_end);
    device.observe(at::scalar_tensor(kv_end, at::kDouble));
  }
  const auto a = host.state(), b = device.state();
  EXPECT_EQ(a.steps, b.steps);
  EXPECT_NEAR(a.log_lambda, b.log_lambda, 1e-12);
  EXPECT_NEAR(a.average, b.average, 1e-12);
  DeviceBudget other(options, at::kCPU);
  other.restore(a);
  EXPECT_EQ(other.state().log_lambda, a.log_lambda);
  EXPECT_EQ(other.lambda().item<double>(), std::exp(a.log_lambda));
}

}  // namespace
}  // namespace natslm::train
