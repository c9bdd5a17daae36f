// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/engine.h"

#include <ATen/ops/log_softmax.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "natslm/base/error.h"
#include "tests/support/error_of.h"
#include "tests/support/plain_policies.h"
#include "tests/support/small_model.h"

namespace natslm::engine {
namespace {

using test::error_of;
using test::KeepAll;
using ::testing::HasSubstr;
using testing::Patchwork;
using testing::SmallModel;
using testing::some_tokens;

// Token i is the letter 'a' + i, but for 48 (the three bytes of the euro sign come as tokens 45,
// 46, 47) and 49, the end of a text.
class Letters final : public data::Tokenizer {
 public:
  int32_t vocabulary() const override { return 50; }
  void encode_to(std::string_view text, std::vector<int32_t>& ids) const override {
    for (const char c : text) ids.push_back(c - 'a');
  }
  std::string decode(const std::vector<int32_t>& ids) const override {
    std::string text;
    for (const int32_t id : ids) text += token_bytes(id);
    return text;
  }
  std::string token_bytes(int32_t id) const override {
    if (id == 45) return "\xE2";
    if (id == 46) return "\x82";
    if (id == 47) return "\xAC";
    return std::string(1, static_cast<char>('a' + id % 26));
  }
  int32_t end_of_text() const override { return 49; }
  size_t stable_prefix(std::string_view text) const override { return text.size(); }
  uint64_t fingerprint() const override { return 0; }
  void save(const std::filesystem::path&) const override {}
};

// Says a fixed sequence of tokens, whatever it is told; uses the cache like any model.
class Parrot final : public models::Model {
 public:
  explicit Parrot(std::vector<int32_t> says, int32_t context = 64)
      : small_(context), says_(std::move(says)) {
    config_ = small_.config();
  }
  models::TrainingOutput forward(const models::TrainingInput& input) override {
    return small_.forward(input);
  }
  at::Tensor step(const models::StepInput& input, cache::KvCache& cache) override {
    at::Tensor logits = small_.step(input, cache).zero_();
    logits.select(1, says_[std::min(next_, says_.size() - 1)]).fill_(5);
    ++next_;
    return logits;
  }

 private:
  SmallModel small_;
  std::vector<int32_t> says_;
  size_t next_ = 0;
};

std::vector<float> scores_of(std::unique_ptr<cache::Policy> policy,
                             const std::vector<int32_t>& tokens, int32_t chunk) {
  SmallModel model(128);
  Engine engine(model, std::move(policy), nullptr, {.prefill_chunk = chunk});
  return engine.score({.tokens = tokens}).log_probabilities;
}

void expect_near(const std::vector<float>& got, const std::vector<float>& want, double margin,
                 const std::string& where) {
  ASSERT_EQ(got.size(), want.size()) << where;
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(got[i], want[i], margin) << where << ", score " << i;
}

TEST(Engine, ScoresWithoutEvictionAreThoseOfADenseForwardPass) {
  const std::vector<int32_t> tokens = some_tokens(60, 1);
  SmallModel model(128);
  models::TrainingInput input;
  const std::vector<int64_t> wide(tokens.begin(), tokens.end());
  input.tokens = at::from_blob(const_cast<int64_t*>(wide.data()), {1, 60}, at::kLong);
  const at::Tensor dense =
      at::log_softmax(model.forward(input).logits, -1).select(0, 0).contiguous();
  std::vector<float> want;
  for (int64_t i = 1; i < 60; ++i)
    want.push_back(dense.const_data_ptr<float>()[(i - 1) * 50 + tokens[i]]);
  for (const int32_t chunk : {1, 7, 60}) {
    expect_near(scores_of(std::make_unique<KeepAll>(), tokens, chunk), want, 1e-4,
                "chunk " + std::to_string(chunk));
  }
}

TEST(Engine, ChunksOfAnySizeGiveTheSameScoresAndTheSameLiveKeys) {
  const std::vector<int32_t> tokens = some_tokens(100, 2);
  SmallModel model(128);
  Engine whole(model, std::make_unique<Patchwork>(), nullptr, {.prefill_chunk = 128});
  const Scored want = whole.score({.tokens = tokens});
  for (const int32_t chunk : {1, 7, 64}) {
    Engine engine(model, std::make_unique<Patchwork>(), nullptr, {.prefill_chunk = chunk});
    const Scored got = engine.score({.tokens = tokens});
    expect_near(got.log_probabilities, want.log_probabilities, 1e-4,
                "chunk " + std::to_string(chunk));
    EXPECT_EQ(got.use.live_keys, want.use.live_keys) << "chunk " << chunk;
  }
}

TEST(Engine, EvictionChangesScores) {
  // Or the tests above would compare nothing.
  const std::vector<int32_t> tokens = some_tokens(100, 2);
  const auto all = scores_of(std::make_unique<KeepAll>(), tokens, 64);
  const auto some = scores_of(std::make_unique<Patchwork>(), tokens, 64);
  double difference = 0;
  for (size_t i = 0; i < all.size(); ++i)
    difference = std::max<double>(difference, std::abs(all[i] - some[i]));
  EXPECT_GT(difference, 0.01);
}

TEST(Engine, ABatchOfDifferentLengthsGivesWhatEachGivesAlone) {
  SmallModel model(128);
  const std::vector<int32_t> lengths{2, 90, 7, 64, 65, 31};
  Engine batched(model, std::make_unique<Patchwork>(), nullptr, {.prefill_chunk = 16});
  std::map<int32_t, Scored> together;
  for (const int32_t length : lengths) {
    batched.submit(
        ScoreRequest{.tokens = some_tokens(length, length),
                     .on_done = [&, length](Scored s) { together[length] = std::move(s); }});
  }
  batched.run();
  for (const int32_t length : lengths) {
    Engine alone(model, std::make_unique<Patchwork>(), nullptr, {.prefill_chunk = 16});
    const Scored want = alone.score({.tokens = some_tokens(length, length)});
    expect_near(together[length].log_probabilities, want.log_probabilities, 1e-4,
                "length " + std::to_string(length));
    EXPECT_EQ(together[length].use.live_keys, want.use.live_keys);
    EXPECT_EQ(together[length].use.kv_end, want.use.kv_end);
    EXPECT_EQ(together[length].use.kv_mean, want.use.kv_mean);
    EXPECT_EQ(together[length].use.kv_bytes_mean, want.use.kv_bytes_mean);
  }
}

TEST(Engine, GenerationsThatJoinAndLeaveGetTheTokensTheyGetAlone) {
  SmallModel model(128);
  const auto request = [](int i) {
    GenerationRequest r;
    r.prompt = some_tokens(3 + 9 * i, 40 + i);
    r.options.max_new_tokens = 5 + 3 * (i % 3);
    r.options.sampling = {.temperature = 0.8f, .top_p = 0.9f, .seed = static_cast<uint64_t>(i)};
    return r;
  };
  Engine engine(model, std::make_unique<Patchwork>(), nullptr,
                {.prefill_chunk = 8, .max_sequences = 3});
  std::map<int, std::vector<int32_t>> together;
  for (int i = 0; i < 7; ++i) {
    GenerationRequest r = request(i);
    r.on_done = [&, i](Generated g) { together[i] = g.tokens; };
    engine.submit(std::move(r));
  }
  while (engine.step()) EXPECT_LE(engine.working(), 3);
  for (int i = 0; i < 7; ++i) {
    Engine alone(model, std::make_unique<Patchwork>(), nullptr, {.prefill_chunk = 8});
    EXPECT_EQ(together[i], alone.generate(request(i)).tokens) << "request " << i;
  }
}

TEST(Engine, AStepHasNoMoreRowsThanAllowedAndNoChunkIsCut) {
  SmallModel model(128);
  Engine engine(model, std::make_unique<KeepAll>(), nullptr,
                {.prefill_chunk = 16, .max_step_rows = 40});
  for (int i = 0; i < 5; ++i) engine.submit(ScoreRequest{.tokens = some_tokens(64, i)});
  engine.run();
  int64_t total = 0;
  for (const int64_t rows : model.rows_of_steps) {
    EXPECT_LE(rows, 40);
    EXPECT_EQ(rows % 16, 0);
    total += rows;
  }
  EXPECT_EQ(total, 5 * 64);
}

TEST(Engine, APolicysChunkLimitIsHonoured) {
  class Careful : public KeepAll {
    int32_t chunk_limit() const override { return 3; }
  };
  SmallModel model(128);
  Engine engine(model, std::make_unique<Careful>(), nullptr, {.prefill_chunk = 64});
  EXPECT_EQ(engine.prefill_chunk(), 3);
  engine.score({.tokens = some_tokens(10, 1)});
  EXPECT_EQ(model.rows_of_steps, (std::vector<int64_t>{3, 3, 3, 1}));
}

TEST(Engine, ThePromptsEndIsToldOnceToThePolicyOfAGenerationAndNeverOfAScore) {
  class Counts : public KeepAll {
   public:
    explicit Counts(std::vector<int32_t>* ends) : ends_(ends) {}
    void on_prefill_end(const cache::Queries& recent,
                        std::span<cache::StoredKeys> stored) override {
      if (recent.layer == 0) ends_->push_back(static_cast<int32_t>(stored[0].position.size()));
    }
    int32_t query_window() const override { return 1; }
    std::vector<int32_t>* ends_;
  };
  SmallModel model(128);
  std::vector<int32_t> ends;
  Engine engine(model, std::make_unique<Counts>(&ends), nullptr, {.prefill_chunk = 4});
  engine.score({.tokens = some_tokens(10, 1)});
  EXPECT_TRUE(ends.empty());
  GenerationRequest request;
  request.prompt = some_tokens(10, 1);
  request.options.max_new_tokens = 5;
  engine.generate(request);
  EXPECT_EQ(ends, std::vector<int32_t>{10});
}

TEST(Engine, ContextOnlyTokensGetNoScore) {
  SmallModel model(128);
  Engine engine(model, std::make_unique<KeepAll>(), nullptr, {.prefill_chunk = 8});
  const std::vector<int32_t> tokens = some_tokens(50, 3);
  const auto all = engine.score({.tokens = tokens}).log_probabilities;
  for (const int64_t first : {2, 8, 9, 33, 49}) {
    const auto some = engine.score({.tokens = tokens, .first_scored = first}).log_probabilities;
    expect_near(some, {all.begin() + first - 1, all.end()}, 1e-5, "from " + std::to_string(first));
  }
}

TEST(Engine, GenerationStopsAfterMaxNewTokens) {
  SmallModel model(128);
  Engine engine(model, std::make_unique<KeepAll>());
  GenerationRequest request;
  request.prompt = some_tokens(5, 1);
  request.options.max_new_tokens = 9;
  std::vector<int64_t> positions;
  request.on_token = [&](const NewToken& token) { positions.push_back(token.position); };
  const Generated result = engine.generate(request);
  EXPECT_EQ(result.tokens.size(), 9u);
  EXPECT_EQ(result.finish, Finish::kLength);
  EXPECT_EQ(result.prompt_tokens, 5);
  EXPECT_EQ(result.use.tokens, 13);  // the last new token is never fed
  EXPECT_EQ(positions, (std::vector<int64_t>{5, 6, 7, 8, 9, 10, 11, 12, 13}));
  EXPECT_EQ(engine.cache().usage().held_bytes, 0);
}

TEST(Engine, GenerationStopsAtTheEndOfTheText) {
  Parrot model({1, 2, 49, 3});
  const Letters letters;
  Engine engine(model, std::make_unique<KeepAll>(), &letters);
  const Generated result = engine.generate({.prompt = {0}});
  EXPECT_EQ(result.finish, Finish::kEndOfText);
  EXPECT_EQ(result.text, "bc");
  EXPECT_EQ(result.tokens, (std::vector<int32_t>{1, 2, 49}));
}

TEST(Engine, GenerationGoesOnPastTheEndOfTheTextIfAsked) {
  Parrot model({1, 49, 3});
  const Letters letters;
  Engine engine(model, std::make_unique<KeepAll>(), &letters);
  GenerationRequest request{.prompt = {0}};
  request.options.stop_at_end_of_text = false;
  request.options.max_new_tokens = 4;
  EXPECT_EQ(engine.generate(request).finish, Finish::kLength);
}

TEST(Engine, GenerationStopsBeforeAStopString) {
  Parrot model({7, 4, 11, 11, 14});  // hello
  const Letters letters;
  Engine engine(model, std::make_unique<KeepAll>(), &letters);
  GenerationRequest request{.prompt = {0}};
  request.options.stop = {"ll"};
  std::string shown;
  request.on_token = [&](const NewToken& token) { shown += token.text; };
  const Generated result = engine.generate(request);
  EXPECT_EQ(result.finish, Finish::kStopString);
  EXPECT_EQ(result.text, "he");
  EXPECT_EQ(shown, "he");
}

TEST(Engine, TextComesInWholeCharacters) {
  Parrot model({0, 45, 46, 47, 1, 45});
  const Letters letters;
  Engine engine(model, std::make_unique<KeepAll>(), &letters);
  GenerationRequest request{.prompt = {0}};
  request.options.max_new_tokens = 6;
  std::vector<std::string> pieces;
  request.on_token = [&](const NewToken& token) { pieces.emplace_back(token.text); };
  const Generated result = engine.generate(request);
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "", "", "\xE2\x82\xAC", "b", "\xE2"}));
  EXPECT_EQ(result.text,
            "a\xE2\x82\xAC"
            "b\xE2");
}

TEST(Engine, AFullContextEndsAGeneration) {
  SmallModel model(16);
  Engine engine(model, std::make_unique<KeepAll>());
  const Generated result = engine.generate({.prompt = some_tokens(10, 1)});
  EXPECT_EQ(result.finish, Finish::kContextFull);
  EXPECT_EQ(result.tokens.size(), 7u);  // the last one has no position to be read at
  EXPECT_EQ(result.use.tokens, 16);
}

TEST(Engine, ATextLongerThanTheContextIsRefusedUnlessThePolicyRenumbers) {
  class Renumbers : public KeepAll {
    void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys>) override {
      int32_t* last = fresh.last.mutable_data_ptr<int32_t>();
      const int64_t count = fresh.last.size(1);
      for (int64_t i = 0; i < fresh.last.numel(); ++i) {
        last[i] = fresh.first_position + static_cast<int32_t>(i % count) + 7;
      }
    }
    int32_t key_position(int32_t rank, int32_t, int32_t) const override { return rank; }
    bool renumbers() const override { return true; }
  };
  SmallModel model(16);
  Engine engine(model, std::make_unique<KeepAll>());
  const std::string message = error_of([&] { engine.score({.tokens = some_tokens(17, 1)}); });
  EXPECT_THAT(message, HasSubstr("17 tokens"));
  EXPECT_THAT(message, HasSubstr("(16)"));
  EXPECT_EQ(engine.score({.tokens = some_tokens(16, 1)}).log_probabilities.size(), 15u);
  Engine longer(model, std::make_unique<Renumbers>());
  const Scored scored = longer.score({.tokens = some_tokens(50, 1)});
  EXPECT_EQ(scored.log_probabilities.size(), 49u);
  EXPECT_DOUBLE_EQ(scored.use.kv_end, 8.0 / 50);
}

TEST(Engine, ImpossibleRequestsSayWhatIsWrong) {
  SmallModel model(16);
  Engine engine(model, std::make_unique<KeepAll>());
  EXPECT_THAT(error_of([&] { engine.generate({}); }), HasSubstr("prompt is empty"));
  EXPECT_THAT(error_of([&] { engine.generate({.prompt = {50}}); }), HasSubstr("token 50"));
  EXPECT_THAT(error_of([&] { engine.generate({.prompt = {-1}}); }), HasSubstr("token -1"));
  EXPECT_THAT(error_of([&] { engine.score({.tokens = {1}}); }), HasSubstr("cannot be scored"));
  EXPECT_THAT(error_of([&] {
                engine.score({.tokens = {1, 2}, .first_scored = 0});
              }),
              HasSubstr("cannot be scored"));
  GenerationRequest request{.prompt = {1}};
  request.options.stop = {"x"};
  EXPECT_THAT(error_of([&] { engine.generate(request); }), HasSubstr("tokenizer"));
  EXPECT_THAT(
      error_of([&] { Engine(model, std::make_unique<KeepAll>(), nullptr, {.prefill_chunk = 0}); }),
      HasSubstr("chunk of 0"));
  EXPECT_EQ(engine.waiting() + engine.working(), 0);
}

TEST(Engine, ACallbackMayCancelItsOwnOrAWaitingRequest) {
  SmallModel model(64);
  Engine engine(model, std::make_unique<KeepAll>(), nullptr, {.max_sequences = 1});
  int64_t first = 0, second = 0;
  std::map<int64_t, Finish> finishes;
  GenerationRequest request{.prompt = {1, 2}};
  request.options.max_new_tokens = 10;
  request.on_token = [&](const NewToken& token) {
    if (token.position == 4) {
      engine.cancel(first);
      engine.cancel(second);
    }
  };
  request.on_done = [&](Generated g) {
    finishes[first] = g.finish;
    EXPECT_EQ(g.tokens.size(), 3u);
  };
  first = engine.submit(request);
  request.on_token = nullptr;
  request.on_done = [&](Generated g) {
    finishes[second] = g.finish;
    EXPECT_TRUE(g.tokens.empty());
  };
  second = engine.submit(request);
  engine.run();
  EXPECT_EQ(finishes[first], Finish::kCancelled);
  EXPECT_EQ(finishes[second], Finish::kCancelled);
  EXPECT_EQ(engine.cache().usage().live_keys, 0);
}

TEST(Engine, ACallbackMaySubmitTheNextRequest) {
  SmallModel model(64);
  Engine engine(model, std::make_unique<KeepAll>());
  int done = 0;
  std::function<void(Scored)> again = [&](Scored) {
    if (++done < 4) engine.submit(ScoreRequest{.tokens = some_tokens(9, done), .on_done = again});
  };
  engine.submit(ScoreRequest{.tokens = some_tokens(9, 0), .on_done = again});
  engine.run();
  EXPECT_EQ(done, 4);
}

TEST(Engine, ThePeaksOfABatchSumToItsTruePeakAndAPeakIsNeverBelowTheMean) {
  SmallModel model(128);
  Engine engine(model, std::make_unique<Patchwork>(), nullptr, {.prefill_chunk = 16});
  int64_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    engine.submit(ScoreRequest{.tokens = some_tokens(96, i), .on_done = [&](Scored s) {
                                 sum += s.use.kv_bytes_peak;
                                 EXPECT_GE(static_cast<double>(s.use.kv_bytes_peak),
                                           s.use.kv_bytes_mean);
                                 EXPECT_GT(s.use.kv_bytes_mean, 0);
                               }});
  }
  engine.run();
  EXPECT_NEAR(static_cast<double>(sum), static_cast<double>(engine.peak().held_bytes), 4);
}

TEST(Engine, AnAnswerMayBeInspectedWhileItsKeysAreStillInTheCache) {
  SmallModel model(128);
  Engine engine(model, std::make_unique<Patchwork>());
  GenerationRequest request{.prompt = some_tokens(70, 1)};
  request.options.max_new_tokens = 8;
  int inspected = 0;
  request.inspect = [&](const cache::KvCache& cache, int32_t slot) {
    ++inspected;
    const int32_t now = cache.length(slot);
    EXPECT_EQ(now, 77);
    for (int32_t layer = 0; layer < 2; ++layer) {
      for (int32_t head = 0; head < 2; ++head) {
        std::vector<int32_t> want;
        for (int32_t j = 0; j < now; ++j) {
          if (Patchwork::readable(layer, head, now, j)) want.push_back(j);
        }
        EXPECT_EQ(cache.live_positions(slot, layer, head), want);
      }
    }
  };
  engine.generate(request);
  EXPECT_EQ(inspected, 1);
}

}  // namespace
}  // namespace natslm::engine
