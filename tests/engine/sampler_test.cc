// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "natslm/base/error.h"

namespace natslm::engine {
namespace {

constexpr int kDraws = 20000;

// Share of draws that gave each token, over kDraws positions.
std::map<int32_t, double> shares(const std::vector<float>& logits, const Sampling& sampling) {
  std::map<int32_t, double> counts;
  for (int64_t position = 0; position < kDraws; ++position) {
    counts[sample(logits, sampling, position)] += 1.0 / kDraws;
  }
  return counts;
}

// Four standard deviations of a share p estimated from kDraws draws.
double margin(double p) {
  return 4 * std::sqrt(p * (1 - p) / kDraws);
}

const std::vector<float> kLogits{0.5f, 2.0f, -1.0f, 1.5f, 0.0f};

TEST(Sampler, TemperatureZeroTakesTheBestTokenWhateverTheSeed) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(sample(kLogits, {.temperature = 0, .seed = seed}, seed), 1);
  }
}

TEST(Sampler, EqualLogitsGoToTheLowerId) {
  EXPECT_EQ(sample(std::vector<float>{1, 3, 3, 2}, {}, 0), 1);
}

TEST(Sampler, DrawsFollowTheSoftmaxAtEachTemperature) {
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    const auto drawn = shares(kLogits, {.temperature = temperature, .seed = 3});
    double total = 0;
    for (const float logit : kLogits) total += std::exp(logit / temperature);
    for (size_t id = 0; id < kLogits.size(); ++id) {
      const double p = std::exp(kLogits[id] / temperature) / total;
      const double q = drawn.contains(id) ? drawn.at(id) : 0;
      EXPECT_NEAR(q, p, margin(p)) << "token " << id << ", temperature " << temperature;
    }
  }
}

TEST(Sampler, TopKDrawsFromTheKBestOnly) {
  const auto drawn = shares(kLogits, {.temperature = 1, .top_k = 2, .seed = 4});
  ASSERT_EQ(drawn.size(), 2u);
  const double p = 1 / (1 + std::exp(1.5 - 2.0));
  EXPECT_NEAR(drawn.at(1), p, margin(p));
  EXPECT_NEAR(drawn.at(3), 1 - p, margin(p));
}

TEST(Sampler, TopPKeepsTheFewestTokensThatReachTheShare) {
  // Probabilities 0.5, 0.25, 0.125, 0.125.
  const std::vector<float> logits{std::log(2.0f), std::log(1.0f), std::log(0.5f), std::log(0.5f)};
  EXPECT_EQ(shares(logits, {.temperature = 1, .top_p = 0.49f}).size(), 1u);
  EXPECT_EQ(shares(logits, {.temperature = 1, .top_p = 0.74f}).size(), 2u);
  EXPECT_EQ(shares(logits, {.temperature = 1, .top_p = 0.80f}).size(), 3u);
  EXPECT_EQ(shares(logits, {.temperature = 1, .top_p = 1.0f}).size(), 4u);
  const auto two = shares(logits, {.temperature = 1, .top_p = 0.74f});
  EXPECT_NEAR(two.at(0), 2.0 / 3, margin(2.0 / 3));
}

TEST(Sampler, ATinyTopPStillHasTheBestToken) {
  const auto drawn = shares(kLogits, {.temperature = 5, .top_p = 1e-6f});
  ASSERT_EQ(drawn.size(), 1u);
  EXPECT_TRUE(drawn.contains(1));
}

TEST(Sampler, IsAFunctionOfSeedAndPositionAlone) {
  std::vector<int32_t> first, again, other;
  for (int64_t position = 0; position < 64; ++position) {
    first.push_back(sample(kLogits, {.temperature = 1, .seed = 9}, position));
    other.push_back(sample(kLogits, {.temperature = 1, .seed = 10}, position));
  }
  for (int64_t position = 63; position >= 0; --position) {  // in another order
    again.insert(again.begin(), sample(kLogits, {.temperature = 1, .seed = 9}, position));
  }
  EXPECT_EQ(first, again);
  EXPECT_NE(first, other);
}

TEST(Sampler, ATokenThatIsRuledOutIsNeverDrawn) {
  const float never = -std::numeric_limits<float>::infinity();
  EXPECT_FALSE(shares({never, 0, 0, never}, {.temperature = 100}).contains(0));
}

TEST(Sampler, LogitsThatAreNoNumbersAreAnError) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(sample(std::vector<float>{0, nan}, {}, 0), Error);
  const float infinite = std::numeric_limits<float>::infinity();
  EXPECT_THROW(sample(std::vector<float>{-infinite, -infinite}, {}, 0), Error);
}

TEST(Sampler, SettingsOutOfRangeAreNamed) {
  const auto message = [](const Sampling& sampling) -> std::string {
    try {
      check(sampling);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message({.temperature = -1}), ::testing::HasSubstr("temperature -1"));
  EXPECT_THAT(message({.top_k = -2}), ::testing::HasSubstr("top-k -2"));
  EXPECT_THAT(message({.top_p = 0}), ::testing::HasSubstr("top-p 0"));
  EXPECT_THAT(message({.top_p = 1.5f}), ::testing::HasSubstr("top-p 1.5"));
  EXPECT_EQ(message({}), "");
}

}  // namespace
}  // namespace natslm::engine
