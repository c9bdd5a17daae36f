// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "natslm/base/error.h"

namespace natslm::train {
namespace {

struct Case {
  int64_t rows, vocabulary;
};

class CrossEntropy : public ::testing::TestWithParam<Case> {};

TEST_P(CrossEntropy, AndItsGradientAreThoseOfTheDefinition) {
  const auto [rows, vocabulary] = GetParam();
  const at::Tensor logits = at::randn({rows, vocabulary}) * 5;
  const at::Tensor targets = at::randint(vocabulary, {rows}, at::kLong);
  const at::Tensor truth = logits.to(at::kDouble);
  const double loss =
      -at::log_softmax(truth, 1).gather(1, targets.unsqueeze(1)).sum().item<double>();
  const at::Tensor gradient = 0.25 * (at::softmax(truth, 1) - at::one_hot(targets, vocabulary));

  const at::Tensor before = logits.clone();
  EXPECT_NEAR(cross_entropy(logits, targets), loss, 1e-6 * std::abs(loss) + 1e-5);
  EXPECT_TRUE(at::equal(logits, before)) << "the loss alone must not change its input";
  EXPECT_NEAR(cross_entropy_to_gradient(logits, targets, 0.25), loss, 1e-6 * std::abs(loss) + 1e-5);
  EXPECT_LE((logits.to(at::kDouble) - gradient).abs().max().item<double>(), 3e-7);
}

INSTANTIATE_TEST_SUITE_P(Sizes, CrossEntropy,
                         ::testing::Values(Case{1, 1}, Case{1, 2}, Case{3, 7}, Case{65, 2048},
                                           Case{1000, 13}, Case{2, 70000}),
                         [](const auto& test) {
                           return std::to_string(test.param.rows) + "x" +
                                  std::to_string(test.param.vocabulary);
                         });

TEST(CrossEntropyCorners, LargeLogitsNeitherOverflowNorVanish) {
  const at::Tensor logits = at::full({2, 3}, 3e38f);
  logits[1][0] = -3e38f;
  const at::Tensor targets = at::full({2}, 1, at::kLong);
  EXPECT_NEAR(cross_entropy_to_gradient(logits, targets, 1), std::log(3.0) + std::log(2.0), 1e-6);
  EXPECT_FLOAT_EQ(logits[0][0].item<float>(), 1.0f / 3);
  EXPECT_FLOAT_EQ(logits[1][0].item<float>(), 0.0f);
}

TEST(CrossEntropyCorners, TheThreadsDoNotChangeABit) {
  const at::Tensor logits = at::randn({500, 999}), targets = at::randint(999, {500}, at::kLong);
  const int threads = at::get_num_threads();
  at::Tensor one = logits.clone(), two = logits.clone();
  at::set_num_threads(1);
  const double loss = cross_entropy_to_gradient(one, targets, 1);
  at::set_num_threads(2);
  EXPECT_EQ(loss, cross_entropy_to_gradient(two, targets, 1));
  EXPECT_TRUE(at::equal(one, two));
  at::set_num_threads(threads);
}

TEST(CrossEntropyCorners, Bfloat16LogitsAreWorkedOnInFloat) {
  const at::Tensor logits = at::randn({9, 50}).to(at::kBFloat16);
  const at::Tensor wide = logits.to(at::kFloat), targets = at::randint(50, {9}, at::kLong);
  EXPECT_EQ(cross_entropy_to_gradient(logits, targets, 1),
            cross_entropy_to_gradient(wide, targets, 1));
  EXPECT_TRUE(at::equal(logits, wide.to(at::kBFloat16)));
}

TEST(CrossEntropyCorners, ATargetOutsideTheVocabularyIsRefused) {
  for (const int64_t target : {int64_t{-1}, int64_t{5}}) {
    EXPECT_THAT(
        [&] {
          cross_entropy(at::randn({1, 5}), at::full({1}, target, at::kLong));
        },
        ::testing::ThrowsMessage<Error>(::testing::HasSubstr("token id " + std::to_string(target) +
                                                             " is outside the vocabulary of 5")));
  }
  EXPECT_THROW(cross_entropy(at::randn({2, 5}), at::full({1}, 0, at::kLong)), Error);
}

}  // namespace
}  // namespace natslm::train
