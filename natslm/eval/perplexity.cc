// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/perplexity.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/engine/engine.h"
#include "natslm/eval/runs.h"

namespace natslm::eval {
namespace {

// What one window brought.
struct Outcome {
  double nll = 0;  // sum
  engine::KeyUse use;
  std::vector<int32_t> best;
};

std::vector<int64_t> lengths_of(const Streams& streams) {
  std::vector<int64_t> lengths;
  for (const auto& stream : streams) lengths.push_back(static_cast<int64_t>(stream.size()));
  return lengths;
}

PerplexityResult summarise(std::span<const Window> windows, const std::vector<Outcome>& outcomes,
                           int64_t full_length) {
  PerplexityResult result;
  result.windows = std::ssize(windows);
  std::vector<engine::KeyUse> uses;
  std::vector<double> nll, scored;
  for (size_t i = 0; i < windows.size(); ++i) {
    uses.push_back(outcomes[i].use);
    nll.push_back(outcomes[i].nll);
    scored.push_back(static_cast<double>(windows[i].scored()));
    result.nll += outcomes[i].nll;
    result.tokens += windows[i].scored();
  }
  result.nll /= static_cast<double>(result.tokens);
  result.nll_error = standard_error(nll, scored);
  result.perplexity = std::exp(result.nll);
  const KeyMeans keys = means_of(uses, full_length);
  result.kv_end = keys.kv_end;
  result.kv_end_full = keys.kv_end_full;
  result.kv_mean = keys.kv_mean;
  result.demoted = keys.demoted;
  result.kv_peak_over_cap = keys.kv_peak_over_cap;
  result.kv_bytes_mean = keys.kv_bytes_mean;
  result.kv_bytes_peak = keys.kv_bytes_peak;
  return result;
}

}  // namespace

std::vector<Window> windows(std::span<const int64_t> stream_tokens,
                            const PerplexityOptions& options) {
  const int64_t context = options.context, stride = options.stride;
  NATSLM_CHECK(options.continuous || context >= 2, "a context of ", context,
               " tokens is too short: a window needs 2 or more, one of them to score");
  NATSLM_CHECK(stride >= 0 && (stride == 0 || options.continuous || stride < context),
               "a stride of ", stride, " does not fit a context of ", context, ": give 1 to ",
               context - 1, ", or 0 for windows that do not overlap");
  NATSLM_CHECK(!options.continuous || stride == 0, "a stride of ", stride,
               " and one continuous window exclude each other: give one of them");
  NATSLM_CHECK(options.max_tokens >= 0, "max_tokens ", options.max_tokens,
               " is not allowed: give 0 (all) or more");
  std::vector<Window> all;
  int64_t budget = options.max_tokens > 0 ? options.max_tokens : INT64_MAX;
  for (size_t stream = 0; stream < stream_tokens.size(); ++stream) {
    const int64_t size = std::min(stream_tokens[stream], budget);
    budget -= size;
    const int64_t length = options.continuous ? size : context;
    const int64_t step = stride > 0 ? stride : length;
    int64_t scored = 0;  // tokens of the stream before this one are dealt with
    for (int64_t begin = 0; scored < size && size >= 2; begin += step) {
      const int64_t end = std::min(begin + length, size);
      const int64_t first = stride > 0 ? std::max(scored, begin + 1) : begin + 1;
      if (first < end) all.push_back({static_cast<int64_t>(stream), begin, end, first});
      scored = end;
    }
  }
  return all;
}

PerplexityResult perplexity(models::Model& model, std::unique_ptr<cache::Policy> policy,
                            const Streams& streams, const PerplexityOptions& options,
                            const Progress& progress) {
  PerplexityOptions settings = options;
  if (settings.context == 0) settings.context = model.config().context;
  const std::vector<Window> all = windows(lengths_of(streams), settings);
  NATSLM_CHECK(!all.empty(),
               "the text is too short to score: it needs two tokens or more in a file");
  return score_windows(model, std::move(policy), streams, all, settings, progress);
}

PerplexityResult score_windows(models::Model& model, std::unique_ptr<cache::Policy> policy,
                               const Streams& streams, std::span<const Window> all,
                               const PerplexityOptions& options, const Progress& progress) {
  const std::string spec = policy->spec();
  engine::Engine engine(model, std::move(policy), nullptr, engine_options(model, options));
  std::vector<Outcome> outcomes(all.size());
  int64_t scored = 0;
  const auto begin = std::chrono::steady_clock::now();
  size_t next = 0;
  // A few ahead of the engine: the text is not copied whole.
  const auto refill = [&] {
    for (; next < all.size() && engine.waiting() < 64; ++next) {
      const Window& window = all[next];
      const std::vector<int32_t>& stream = streams[window.stream];
      engine::ScoreRequest request;
      request.tokens.assign(stream.begin() + window.begin, stream.begin() + window.end);
      request.first_scored = window.first_scored - window.begin;
      request.want_best = options.keep_best;
      request.on_done = [&outcome = outcomes[next], &scored](engine::Scored result) {
        for (const float score : result.log_probabilities) outcome.nll -= score;
        outcome.use = result.use;
        outcome.best = std::move(result.best);
        scored += static_cast<int64_t>(result.log_probabilities.size());
      };
      engine.submit(std::move(request));
    }
  };
  for (refill(); engine.step(); refill()) {
    if (progress) progress(scored);
  }
  PerplexityResult result = summarise(all, outcomes, options.context);
  result.policy = spec;
  for (const Outcome& outcome : outcomes)
    result.best.insert(result.best.end(), outcome.best.begin(), outcome.best.end());
  result.prefill_chunk = engine.prefill_chunk();
  result.batch_bytes_peak = engine.peak().held_bytes;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  NATSLM_CHECK(
      std::isfinite(result.perplexity),
      "the perplexity is not finite: the model's weights are damaged or training diverged; take an "
      "earlier checkpoint");
  return result;
}

double agreement(const PerplexityResult& a, const PerplexityResult& b) {
  NATSLM_ASSERT(!a.best.empty() && a.best.size() == b.best.size());
  int64_t same = 0;
  for (size_t i = 0; i < a.best.size(); ++i) same += a.best[i] == b.best[i];
  return static_cast<double>(same) / static_cast<double>(a.best.size());
}

}  // namespace natslm::eval
