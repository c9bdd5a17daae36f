// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/perplexity.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/log_softmax.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "natslm/base/error.h"
#include "natslm/eval/comparison.h"
#include "natslm/eval/tasks.h"
#include "tests/support/error_of.h"
#include "tests/support/plain_policies.h"
#include "tests/support/small_model.h"

namespace natslm::eval {
namespace {

using test::error_of;
using test::KeepAll;
using ::testing::HasSubstr;
using testing::Patchwork;
using testing::SmallModel;
using testing::some_tokens;

// Sum of -log p over tokens [first, tokens.size()), by dense attention.
double dense_nll(SmallModel& model, const std::vector<int32_t>& tokens, int64_t first) {
  const std::vector<int64_t> wide(tokens.begin(), tokens.end());
  models::TrainingInput input;
  input.tokens = at::from_blob(const_cast<int64_t*>(wide.data()),
                               {1, static_cast<int64_t>(wide.size())}, at::kLong);
  const at::Tensor scores =
      at::log_softmax(model.forward(input).logits, -1).select(0, 0).contiguous();
  const float* row = scores.const_data_ptr<float>();
  double nll = 0;
  for (size_t i = first; i < tokens.size(); ++i) {
    nll -= row[(i - 1) * model.config().vocabulary + tokens[i]];
  }
  return nll;
}

std::vector<int32_t> part(const std::vector<int32_t>& tokens, int64_t begin, int64_t end) {
  return {tokens.begin() + begin, tokens.begin() + std::min<int64_t>(end, tokens.size())};
}

TEST(Windows, WithoutStrideAreCutOneAfterTheOtherAndScoreAllButTheirFirstToken) {
  for (int64_t size = 0; size <= 30; ++size) {
    for (int32_t context = 2; context <= 12; ++context) {
      std::vector<Window> want;
      for (int64_t begin = 0; begin + 2 <= size; begin += context) {
        want.push_back({0, begin, std::min<int64_t>(begin + context, size), begin + 1});
      }
      const auto got = windows(std::vector<int64_t>{size}, {.context = context});
      ASSERT_EQ(got.size(), want.size()) << size << " tokens, context " << context;
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_EQ(got[i].begin, want[i].begin);
        EXPECT_EQ(got[i].end, want[i].end);
        EXPECT_EQ(got[i].first_scored, want[i].first_scored);
      }
    }
  }
}

TEST(Windows, WithAStrideScoreEveryTokenButTheFirstExactlyOnceWithAllTheContextThereIs) {
  for (int64_t size = 0; size <= 30; ++size) {
    for (int32_t context = 2; context <= 12; ++context) {
      for (int32_t stride = 1; stride < context; ++stride) {
        std::vector<int> scored(size, 0);
        int64_t begin = 0;
        for (const Window& w :
             windows(std::vector<int64_t>{size}, {.context = context, .stride = stride})) {
          EXPECT_EQ(w.begin, begin);
          begin += stride;
          EXPECT_EQ(w.end, std::min<int64_t>(w.begin + context, size));
          if (w.begin > 0) {
            EXPECT_LE(w.scored(), stride);
            EXPECT_EQ(w.first_scored, w.begin + context - stride);
          }
          for (int64_t i = w.first_scored; i < w.end; ++i) ++scored[i];
        }
        for (int64_t i = 0; i < size; ++i) {
          ASSERT_EQ(scored[i], i > 0 && size >= 2)
              << "token " << i << " of " << size << ", context " << context << ", stride "
              << stride;
        }
      }
    }
  }
}

TEST(Windows, ContinuousIsOneForAWholeStream) {
  const auto all = windows(std::vector<int64_t>{100, 1, 0, 2}, {.context = 8, .continuous = true});
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].end, 100);
  EXPECT_EQ(all[0].scored(), 99);
  EXPECT_EQ(all[1].stream, 3);
}

TEST(Windows, MaxTokensCutsTheTextNotTheWindowsRule) {
  const auto all = windows(std::vector<int64_t>{10, 10, 10}, {.context = 8, .max_tokens = 15});
  ASSERT_EQ(all.size(), 3u);  // 8 + 2 of the first stream, 5 of the second
  EXPECT_EQ(all[2].stream, 1);
  EXPECT_EQ(all[2].end, 5);
}

TEST(Windows, ImpossibleOptionsAreNamed) {
  const std::vector<int64_t> size{50};
  EXPECT_THAT(error_of([&] { windows(size, {.context = 1}); }), HasSubstr("context of 1"));
  EXPECT_THAT(error_of([&] { windows(size, {.context = 8, .stride = 8}); }), HasSubstr("1 to 7"));
  EXPECT_THAT(error_of([&] { windows(size, {.context = 8, .stride = -1}); }),
              HasSubstr("stride of -1"));
  EXPECT_THAT(error_of([&] { windows(size, {.context = 8, .stride = 2, .continuous = true}); }),
              HasSubstr("exclude"));
}

TEST(Perplexity, OfKeepingAllIsThatOfDenseAttention) {
  SmallModel model(64);
  const Streams streams{some_tokens(150, 1), some_tokens(64, 2), some_tokens(1, 3),
                        some_tokens(33, 4)};
  double nll = 0;
  int64_t scored = 0;
  for (const auto& stream : streams) {
    for (int64_t begin = 0; begin + 2 <= static_cast<int64_t>(stream.size()); begin += 32) {
      const auto window = part(stream, begin, begin + 32);
      nll += dense_nll(model, window, 1);
      scored += static_cast<int64_t>(window.size()) - 1;
    }
  }
  const auto got = perplexity(model, std::make_unique<KeepAll>(), streams, {.context = 32});
  EXPECT_EQ(got.tokens, scored);
  EXPECT_NEAR(got.nll, nll / scored, 1e-4);
  EXPECT_NEAR(got.perplexity, std::exp(nll / scored), 1e-4 * got.perplexity);
  EXPECT_EQ(got.kv_end, 1);
  EXPECT_EQ(got.windows, 5 + 2 + 0 + 1);  // of 33 tokens the last alone has nothing to score
}

TEST(Perplexity, WithAStrideIsThatOfDenseAttentionOnEachWindowsLastTokens) {
  SmallModel model(64);
  const Streams streams{some_tokens(101, 5)};
  double nll = dense_nll(model, part(streams[0], 0, 32), 1);
  for (int64_t begin = 10; begin + 22 < 101; begin += 10) {
    nll += dense_nll(model, part(streams[0], begin, begin + 32), 22);
  }
  const auto got =
      perplexity(model, std::make_unique<KeepAll>(), streams, {.context = 32, .stride = 10});
  EXPECT_EQ(got.tokens, 100);
  EXPECT_NEAR(got.nll, nll / 100, 1e-4);
}

TEST(Perplexity, ContinuousIsThatOfOneLongWindow) {
  SmallModel model(128);
  const Streams streams{some_tokens(101, 6), some_tokens(50, 7)};
  const double nll = dense_nll(model, streams[0], 1) + dense_nll(model, streams[1], 1);
  const auto got =
      perplexity(model, std::make_unique<KeepAll>(), streams, {.context = 16, .continuous = true});
  EXPECT_EQ(got.windows, 2);
  EXPECT_NEAR(got.nll, nll / 149, 1e-4);
}

TEST(Perplexity, ContinuousGoesBeyondTheContextOnlyIfPositionsAreRenumbered) {
  SmallModel model(32);
  const Streams streams{some_tokens(100, 6)};
  const PerplexityOptions options{.continuous = true};
  EXPECT_THAT(error_of([&] { perplexity(model, std::make_unique<KeepAll>(), streams, options); }),
              HasSubstr("100 tokens is longer than the context"));
  const auto context = policy_context(model);
  const auto got = perplexity(model, policies::make_policy("streaming:sinks=2,window=10", context),
                              streams, options);
  EXPECT_EQ(got.tokens, 99);
  EXPECT_NEAR(got.kv_end, 12.0 / 100, 1e-12);
}

TEST(Perplexity, BatchAndChunkChangeNeitherQualityNorKeys) {
  SmallModel model(64);
  const Streams streams{some_tokens(300, 8), some_tokens(77, 9)};
  const auto run = [&](int32_t chunk, int32_t batch) {
    return perplexity(model, std::make_unique<Patchwork>(), streams,
                      {.context = 48, .prefill_chunk = chunk, .batch = batch});
  };
  const auto want = run(48, 1);
  for (const int32_t chunk : {1, 7, 48}) {
    for (const int32_t batch : {1, 3, 100}) {
      const auto got = run(chunk, batch);
      EXPECT_NEAR(got.nll, want.nll, 1e-5) << "chunk " << chunk << ", batch " << batch;
      EXPECT_NEAR(got.kv_end, want.kv_end, 1e-12);
      EXPECT_NEAR(got.kv_mean, want.kv_mean, 1e-12);
      EXPECT_EQ(got.tokens, want.tokens);
    }
  }
}

TEST(Perplexity, BytesAreThoseOfOneSequenceWhateverTheBatch) {
  SmallModel model(64);
  const Streams streams{some_tokens(64 * 6, 8)};
  const auto run = [&](int32_t batch) {
    return perplexity(model, std::make_unique<KeepAll>(), streams,
                      {.prefill_chunk = 16, .batch = batch});
  };
  const auto alone = run(1), together = run(6);
  EXPECT_EQ(alone.kv_bytes_mean, together.kv_bytes_mean);
  EXPECT_EQ(alone.kv_bytes_peak, together.kv_bytes_peak);
  EXPECT_EQ(together.batch_bytes_peak, 6 * alone.batch_bytes_peak);
  // 64 keys of 2 x 8 floats in 2 layers x 2 KV heads, rounded up to pages.
  EXPECT_GE(alone.kv_bytes_peak, 64 * 2 * 8 * 4 * 4);
}

TEST(Perplexity, KvAtEndIsWhatTheLastTokenReads) {
  SmallModel model(64);
  const Streams streams{some_tokens(64 + 20, 8)};
  const auto policy =
      policies::make_policy("streaming-original:sinks=3,window=9", policy_context(model));
  const auto got =
      perplexity(model, policies::make_policy(policy->spec(), policy_context(model)), streams);
  EXPECT_NEAR(got.kv_end, (12.0 / 64 + 12.0 / 20) / 2, 1e-12);
  EXPECT_NEAR(got.kv_end_full, 12.0 / 64, 1e-12);
  double mean = 0;
  for (const int length : {64, 20}) {
    for (int i = 0; i < length; ++i) mean += std::min(12, i + 1) / (i + 1.0) / 84;
  }
  EXPECT_NEAR(got.kv_mean, mean, 1e-12);
  EXPECT_EQ(got.policy, "streaming-original:sinks=3,window=9");
}

TEST(Perplexity, ProgressCountsToTheEndAndMayStopTheRun) {
  SmallModel model(64);
  const Streams streams{some_tokens(640, 8)};
  int64_t last = 0;
  perplexity(model, std::make_unique<KeepAll>(), streams, {.batch = 2}, [&](int64_t scored) {
    EXPECT_GE(scored, last);
    last = scored;
  });
  EXPECT_EQ(last, 10 * 63);
  EXPECT_EQ(error_of([&] {
              perplexity(model, std::make_unique<KeepAll>(), streams, {.batch = 2},
                         [](int64_t) { fail("stopped"); });
            }),
            "stopped");
}

TEST(Perplexity, TextWithoutATokenToScoreIsAnError) {
  SmallModel model(64);
  const auto run = [&](const Streams& streams) {
    return error_of([&] { perplexity(model, std::make_unique<KeepAll>(), streams); });
  };
  EXPECT_THAT(run({}), HasSubstr("too short to score"));
  EXPECT_THAT(run({{}, {1}}), HasSubstr("too short to score"));
}

TEST(Tasks, AnUnknownOneListsTheKnown) {
  EXPECT_EQ(task("ppl").name, "ppl");
  EXPECT_THAT(error_of([] { task("needles"); }), HasSubstr("known are ppl"));
}

TEST(Perplexity, SaysWhichTokensWereMostProbableInEachScoredOnesPlace) {
  SmallModel model;
  const auto tokens = some_tokens(60, 5);
  PerplexityOptions options{.context = 40, .prefill_chunk = 7};
  EXPECT_TRUE(perplexity(model, std::make_unique<KeepAll>(), {tokens}, options).best.empty());
  options.keep_best = true;
  const auto all = perplexity(model, std::make_unique<KeepAll>(), {tokens}, options);
  std::vector<int32_t> want;
  for (const auto& [begin, end] : {std::pair{0, 40}, {40, 60}}) {
    const auto window = part(tokens, begin, end);
    const std::vector<int64_t> wide(window.begin(), window.end());
    models::TrainingInput input;
    input.tokens =
        at::from_blob(const_cast<int64_t*>(wide.data()), {1, std::ssize(wide)}, at::kLong);
    const at::Tensor best = model.forward(input).logits.argmax(-1).contiguous();
    for (int64_t i = 0; i + 1 < std::ssize(wide); ++i)
      want.push_back(static_cast<int32_t>(best.const_data_ptr<int64_t>()[i]));
  }
  EXPECT_EQ(all.best, want);
  EXPECT_EQ(agreement(all, all), 1);
  PerplexityResult other = all;
  other.best[3] += 1;
  EXPECT_DOUBLE_EQ(agreement(all, other), 1 - 1.0 / static_cast<double>(want.size()));
}

}  // namespace
}  // namespace natslm::eval
