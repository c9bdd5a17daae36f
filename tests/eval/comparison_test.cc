// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/comparison.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "natslm/base/error.h"
#include "tests/support/small_model.h"

namespace natslm::eval {
namespace {

using ::testing::HasSubstr;
using testing::SmallModel;
using testing::some_tokens;

constexpr int32_t kContext = 256;

double measured(SmallModel& model, const std::string& spec, const Streams& streams) {
  return perplexity(model, policies::make_policy(spec, policy_context(model, 0, 3)), streams)
      .kv_end;
}

TEST(Comparison, EveryPolicyWithABudgetMeetsItWhenMeasured) {
  SmallModel model(kContext);
  const Streams streams{some_tokens(kContext * 3, 1)};
  for (const policies::Entry& entry : policies::table()) {
    if (!has_budget(entry.name)) continue;
    for (const double budget : {0.2, 0.4}) {
      const std::string spec = spec_at_budget(model, entry.name, budget, streams, {}, 3);
      EXPECT_NEAR(measured(model, spec, streams), budget, 0.03 * budget) << spec;
    }
  }
}

TEST(Comparison, AtEqualBudgetEachRivalKeepsWhatTheLearnedRolesKeep) {
  SmallModel model(kContext), rival(kContext, 9);
  const Streams streams{some_tokens(kContext * 2, 1), some_tokens(40, 2)};
  std::vector<std::string> told;
  const auto results = compare_at_equal_budget(
      model, "learned:bias=1", rival, {"streaming", "h2o", "random"}, streams, {}, 3,
      [&](const PerplexityResult& result) { told.push_back(result.policy); });
  ASSERT_EQ(results.size(), 5u);
  EXPECT_EQ(results[0].policy, "full");
  EXPECT_EQ(results[0].kv_end, 1);
  EXPECT_EQ(results[1].policy, "learned:bias=1");
  const double budget = results[1].kv_end_full;
  EXPECT_GT(budget, 0.02);
  EXPECT_LT(budget, 0.9);
  for (size_t i = 2; i < results.size(); ++i) {
    EXPECT_NEAR(results[i].kv_end_full, budget, 0.03 * budget) << results[i].policy;
  }
  ASSERT_EQ(told.size(), 5u);
  for (size_t i = 0; i < told.size(); ++i) EXPECT_EQ(told[i], results[i].policy);
}

TEST(Comparison, TheRivalsRunOnTheRivalModel) {
  SmallModel model(kContext), rival(kContext, 9);
  const Streams streams{some_tokens(kContext, 1)};
  const auto results = compare_at_equal_budget(model, "learned", rival, {}, streams, {});
  const auto alone = compare({{"full", &rival}, {"learned", &model}}, streams, {});
  EXPECT_EQ(results[0].nll, alone[0].nll);
  EXPECT_EQ(results[1].nll, alone[1].nll);
  EXPECT_NE(compare({{"full", &model}}, streams, {})[0].nll, alone[0].nll);
}

TEST(Comparison, ABudgetOutOfReachSaysWhatIsInReach) {
  SmallModel model(kContext);
  const Streams streams{some_tokens(kContext, 1)};
  const auto error = [&](const std::string& spec, double budget) -> std::string {
    try {
      spec_at_budget(model, spec, budget, streams, {});
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_THAT(error("learned", 0.001), HasSubstr("its budget bias reaches"));
  EXPECT_THAT(error("streaming", 0.001), HasSubstr("fewer than"));
  EXPECT_THAT(error("streaming", 1.5), HasSubstr("1.5"));
  EXPECT_THAT(error("full", 0.5), HasSubstr("no key budget"));
}

TEST(Comparison, LearnedRolesUnderABudgetTakeTheBestBiasThatIsKnown) {
  SmallModel model(kContext);
  const Streams text{some_tokens(kContext, 1)}, few{some_tokens(9, 1)};
  const roles::Calibration calibration{{-1, 1}, {0.5f, 0.1f}, {}};
  const auto of = [&](const char* spec, const policies::KeyBudget& budget, const Streams& streams,
                      const roles::Calibration* table) {
    const double kv_end = share_of(budget, model, kContext);
    return spec_under_budget(model, spec, budget, kv_end, streams, {}, 0, table);
  };
  EXPECT_EQ(of("learned:bias=2", {0.3, 0}, text, nullptr), "learned:bias=2,budget=0.3");
  EXPECT_EQ(of("learned", {0.3, 0}, text, &calibration), "learned:budget=0.3");
  EXPECT_EQ(of("learned", {0.3, 0}, few, nullptr), "learned:budget=0.3");
  EXPECT_EQ(of("learned", {0, 7}, few, nullptr), "learned:keys=7");
  const std::string measured_here = of("learned", {0.3, 0}, text, nullptr);
  EXPECT_THAT(measured_here, HasSubstr("learned:bias="));
  EXPECT_THAT(measured_here, HasSubstr(",budget=0.3"));
  EXPECT_LE(measured(model, measured_here, text), 0.3);
  // A budget that no bias reaches is kept all the same, but for the floor.
  const std::string tiny = of("learned", {0.001, 0}, text, nullptr);
  EXPECT_LE(measured(model, tiny, text), (model.config().roles.window + 2.0) / kContext + 1e-9);
}

TEST(Comparison, AContenderWithABudgetNeverPassesIt) {
  SmallModel model(kContext);
  const Streams streams{some_tokens(kContext * 3, 1)};
  const auto results = compare({{"learned", &model, {0.3, 0}},
                                {"learned", &model, {0, 100}},
                                {"streaming", &model, {0, 120}},
                                {"full", &model, {0.3, 0}}},
                               streams, {});
  EXPECT_LE(results[0].kv_end, 0.3);
  EXPECT_GT(results[0].demoted, 0);
  EXPECT_LE(results[0].kv_peak_over_cap, 1);
  EXPECT_LE(results[1].kv_end * kContext * 4, 100 + 1e-9);
  EXPECT_LE(results[1].kv_peak_over_cap, 1);
  EXPECT_NEAR(results[2].kv_end * kContext * 4, 120, 4);
  EXPECT_EQ(results[2].kv_peak_over_cap, 0);
  EXPECT_EQ(results[3].kv_end, 1);
}

}  // namespace
}  // namespace natslm::eval
