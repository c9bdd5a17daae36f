// Training on a GPU: the trajectory of the CPU within bfloat16, the same bits with and without a
// graph and from run to run, checkpoints that either device continues.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "natslm/base/error.h"
#include "natslm/models/models.h"
#include "natslm/models/training_pass.h"
#include "natslm/train/device.h"
#include "natslm/train/device_steps.h"
#include "natslm/train/validate.h"
#include "tests/train/tiny_run.h"

namespace natslm::train {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const c10::Device kGpu(c10::kCUDA, 0);

models::Config config_of(roles::RoleSet set) {
  models::Config config;
  config.layers = 3;
  config.width = 128;
  config.q_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.hidden = 256;
  config.vocabulary = TinyModel::kVocabulary;
  config.context = 200;
  config.initial_deviation = 0.06;
  config.roles = {.set = set, .window = 6, .chunk = 1};
  return config;
}

Options options_of() {
  Options o = tiny_options();
  o.context = 192;
  o.batch = 8;
  o.steps = 20;
  o.learning_rate = 3e-3;
  return o;
}

class OnTheGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA())
      GTEST_SKIP() << "NOT TESTED: there is no GPU, or this build has no CUDA code";
    prepare_cuda();
  }

  std::unique_ptr<models::Model> model(roles::RoleSet set, c10::Device device) const {
    auto m = models::make_model(config_of(set), 3);
    m->to(device);
    return m;
  }

  std::vector<FinishedStep> steps_of(models::Model& m, const Options& options, int64_t count,
                                     const DeviceStepOptions& how) const {
    const auto steps = m.device().is_cpu() ? make_autograd_steps(m, dataset, options)
                                           : make_device_steps(m, dataset, options, how);
    std::vector<FinishedStep> done;
    int64_t begun = 0;
    while (std::ssize(done) < count) {
      while (begun < count && begun - std::ssize(done) <= steps->ahead()) steps->begin(begun++);
      done.push_back(steps->finish());
    }
    return done;
  }

  static void expect_same_weights(const models::Model& a, const models::Model& b) {
    for (size_t i = 0; i < a.parameters().size(); ++i) {
      const auto& [name, p] = a.parameters()[i];
      EXPECT_TRUE(at::equal(p.cpu(), b.parameters()[i].second.cpu())) << name;
    }
  }

  data::TokenDataset dataset{tiny_text(200000), TinyModel::kVocabulary, 5};
};

TEST_F(OnTheGpu, ALossTrajectoryIsTheCpusWithinBFloat16) {
  for (const roles::RoleSet set : {roles::RoleSet::kDense, roles::RoleSet::kGls}) {
    SCOPED_TRACE(roles::name(set));
    const auto a = model(set, c10::kCPU), b = model(set, kGpu);
    const auto x = steps_of(*a, options_of(), 20, {}), y = steps_of(*b, options_of(), 20, {});
    for (size_t i = 0; i < x.size(); ++i) {
      // The first loss differs by rounding alone; later ones by what rounding did to the roles
      // drawn and to weights since.
      EXPECT_NEAR(y[i].report.loss, x[i].report.loss, i == 0 ? 0.01 : 0.06) << "step " << i + 1;
      EXPECT_NEAR(y[i].report.kv_end, x[i].report.kv_end, 0.06) << "step " << i + 1;
      EXPECT_NEAR(y[i].report.gradient_norm, x[i].report.gradient_norm,
                  0.15 * x[i].report.gradient_norm)
          << "step " << i + 1;
      EXPECT_EQ(y[i].report.step, x[i].report.step);
    }
    EXPECT_LT(y.back().report.loss, y.front().report.loss - 0.2);
  }
}

TEST_F(OnTheGpu, GradientsOfAPassAreTheCpusWithinBFloat16) {
  for (const roles::RoleSet set : {roles::RoleSet::kDense, roles::RoleSet::kGls}) {
    SCOPED_TRACE(roles::name(set));
    const auto a = model(set, c10::kCPU), b = model(set, kGpu);
    const auto x = a->training_pass(at::kFloat), y = b->training_pass(at::kBFloat16);
    const at::Tensor windows = at::randint(TinyModel::kVocabulary, {4, 193}, at::kInt);
    models::TrainingInput input;
    input.seed = 5;
    const models::PassGradients want{.loss_weight = 1.0 / (4 * 192)};
    const auto run = [&](models::TrainingPass& pass, const at::Tensor& w) {
      input.tokens = w.slice(1, 0, 192).contiguous();
      return pass.loss_and_gradients(input, w.slice(1, 1).contiguous(), want);
    };
    const double expected = run(*x, windows).loss.item<double>();
    EXPECT_NEAR(run(*y, windows.to(kGpu)).loss.item<double>(), expected, 5e-3 * expected);
    for (size_t i = 0; i < x->gradients().size(); ++i) {
      const std::string& name = a->parameters()[i].first;
      const at::Tensor truth = x->gradients()[i], off = y->gradients()[i].cpu() - truth;
      // A role that rounding turns moves the role sums of its neighbours.
      const double allowed = set == roles::RoleSet::kDense ? 0.03 : 0.25;
      EXPECT_LE(off.norm().item<double>(), allowed * truth.norm().item<double>()) << name;
    }
  }
}

TEST_F(OnTheGpu, AGraphTakesTheSameStepsBitForBit) {
  Options options = options_of();
  for (const int64_t micro : {0, 2}) {
    options.micro_batch = micro;
    const auto a = model(roles::RoleSet::kGls, kGpu), b = model(roles::RoleSet::kGls, kGpu),
               c = model(roles::RoleSet::kGls, kGpu);
    const auto x = steps_of(*a, options, 12, {.graph = true}),
               y = steps_of(*b, options, 12, {.graph = false}),
               z = steps_of(*c, options, 12, {.graph = true});
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_EQ(x[i].report.loss, y[i].report.loss) << "with and without, step " << i + 1;
      EXPECT_EQ(x[i].report.lambda, y[i].report.lambda) << "step " << i + 1;
      EXPECT_EQ(x[i].report.loss, z[i].report.loss) << "two runs, step " << i + 1;
    }
    expect_same_weights(*a, *b);
    expect_same_weights(*a, *c);
  }
}

TEST_F(OnTheGpu, OptionsOfTheRolesWork) {
  Options options = options_of();
  options.optimize = kAlternating;
  options.bias_range = 2;
  options.role_rate = 2;
  options.end_term = true;
  const auto a = model(roles::RoleSet::kGls, c10::kCPU), b = model(roles::RoleSet::kGls, kGpu);
  const auto x = steps_of(*a, options, 8, {}), y = steps_of(*b, options, 8, {});
  for (size_t i = 0; i < x.size(); ++i)
    EXPECT_NEAR(y[i].report.loss, x[i].report.loss, 0.06) << "step " << i + 1;
}

TEST_F(OnTheGpu, EitherDeviceContinuesACheckpointOfTheOther) {
  const ScratchFolder whole_folder, folder, host_folder, back_folder;
  // A run is resumed from its own folder, which these stand in for.
  for (const ScratchFolder* f : {&folder, &host_folder, &back_folder}) {
    std::filesystem::create_directories(checkpoint_folder(f->path()));
  }
  Options options = options_of();
  options.checkpoint_every = 5;
  options.keep_checkpoints = 9;
  const auto whole = model(roles::RoleSet::kGls, kGpu);
  Trainer(*whole, dataset, options, whole_folder.path(), {}).run();
  const auto from = [&](int64_t step) {
    return checkpoint_folder(whole_folder.path()) /
           (step < 10 ? "step-00000" + std::to_string(step) : "step-0000" + std::to_string(step));
  };

  // On the GPU, with the bits of the run that was not interrupted.
  const auto again = model(roles::RoleSet::kGls, kGpu);
  Trainer same(*again, dataset, options, folder.path(), {});
  same.resume(from(10));
  const Result continued = same.run();
  EXPECT_EQ(continued.steps, 20);
  expect_same_weights(*again, *whole);

  // On the CPU, from the GPU's checkpoint, and back again.
  const auto host = model(roles::RoleSet::kGls, c10::kCPU);
  Trainer on_host(*host, dataset, options, host_folder.path(), {});
  on_host.resume(from(15));
  const Result by_host = on_host.run();
  EXPECT_NEAR(by_host.loss, continued.loss, 0.05);
  const auto back = model(roles::RoleSet::kGls, kGpu);
  Trainer again_on_gpu(*back, dataset, options, back_folder.path(), {});
  again_on_gpu.resume(checkpoint_folder(host_folder.path()) / "step-000020");
  EXPECT_EQ(again_on_gpu.steps_done(), 20);
  expect_same_weights(*back, *host);
}

TEST_F(OnTheGpu, ALossThatIsNotFiniteStopsAndNamesStepAndTensor) {
  const ScratchFolder folder;
  const auto m = model(roles::RoleSet::kGls, kGpu);
  m->parameters()[3].second.detach()[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT([&] { Trainer(*m, dataset, options_of(), folder.path(), {}).run(); },
              ThrowsMessage<Error>(AllOf(HasSubstr("step 1: the loss is nan"),
                                         HasSubstr("the weight " + m->parameters()[3].first))));
}

TEST_F(OnTheGpu, ValidationIsTheCpusWithinBFloat16) {
  for (const roles::RoleSet set : {roles::RoleSet::kDense, roles::RoleSet::kGls}) {
    const auto a = model(set, c10::kCPU), b = model(set, kGpu);
    const Validation x = validate(*a, dataset, 192, 4, 10), y = validate(*b, dataset, 192, 4, 10);
    EXPECT_NEAR(y.perplexity, x.perplexity, 0.01 * x.perplexity);
    EXPECT_NEAR(y.shares.kv_end, x.shares.kv_end, 0.03);
    EXPECT_NEAR(y.shares.pairs, x.shares.pairs, 0.03);
  }
}

}  // namespace
}  // namespace natslm::train
