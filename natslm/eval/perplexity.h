// Perplexity through the real evicting cache, as docs/evaluation.md defines it: each file is one
// stream of tokens, cut into windows, each read from an empty cache in chunks and evicting as it
// goes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "natslm/cache/policy.h"
#include "natslm/models/model.h"

namespace natslm::eval {

struct PerplexityOptions {
  int32_t context = 0;         // tokens of a window; 0: the model's context
  int32_t stride = 0;          // windows begin this far apart and overlap; 0: they do not overlap
  bool continuous = false;     // one window, and one cache that is never reset, for a whole stream
  int32_t prefill_chunk = 64;  // tokens of a window per step of the model
  int64_t max_tokens = 0;      // read only the first so many tokens of all streams together; 0: all
  int32_t batch = 0;           // windows at work at the same time; 0: what suits the model
  at::ScalarType cache_dtype = at::ScalarType::Undefined;  // as in engine::Options
  bool keep_best = false;                                  // fills PerplexityResult::best
};

using Streams = std::vector<std::vector<int32_t>>;  // the tokens of each file

// Tokens [begin, end) of a stream, of which [first_scored, end) get a score.
struct Window {
  int64_t stream = 0;
  int64_t begin = 0, end = 0, first_scored = 0;
  int64_t scored() const { return end - first_scored; }
};

// All windows of the protocol, in order. Without a stride every token but a window's first is
// scored; with one, a window's last `stride` tokens (of a stream's first window all but the first
// token). A stream's last, shorter window counts if it has a token to score. `context` must be set.
// Throws Error for impossible options.
std::vector<Window> windows(std::span<const int64_t> stream_tokens,
                            const PerplexityOptions& options);

struct PerplexityResult {
  std::string policy;     // its spec
  double perplexity = 0;  // exp(nll)
  double nll = 0;         // mean negative log-probability of a scored token, natural
  double nll_error = 0;   // its standard error, from how much windows differ; 0 for one window
  int64_t tokens = 0;     // scored
  int64_t windows = 0;
  int32_t prefill_chunk =
      0;  // after the policy's limit: part of the definition of those that have one
  // Keys that a window's last token can read, itself included / tokens of the window; mean over
  // windows, layers and KV heads.
  double kv_end = 0;
  double kv_end_full = 0;  // the same over windows of the full length only (all windows if none is)
  double kv_mean = 0;      // readable keys / keys so far, mean over all tokens
  // Of policies that guarantee a budget (engine::KeyUse):
  int64_t demoted = 0;           // keys given up for it, over all windows
  double kv_peak_over_cap = 0;   // readable keys / those allowed, highest over all tokens
  double kv_bytes_mean = 0;      // held by one window's sequence, mean over all tokens
  int64_t kv_bytes_peak = 0;     // highest of any window's sequence
  int64_t batch_bytes_peak = 0;  // highest of all the windows that were at work at the same time
  double seconds = 0;
  std::vector<int32_t> best;  // the most probable token in each scored one's place, if kept
};

// Share of the scored tokens in whose place both had the same most probable one; both kept them
// over the same windows.
double agreement(const PerplexityResult& a, const PerplexityResult& b);

// Called after each step with the tokens scored so far; may throw to stop.
using Progress = std::function<void(int64_t scored)>;

// Throws Error if there is nothing to score, or for a window longer than the model's context with a
// policy that does not renumber positions.
PerplexityResult perplexity(models::Model& model, std::unique_ptr<cache::Policy> policy,
                            const Streams& streams, const PerplexityOptions& options = {},
                            const Progress& progress = {});

// The same over windows of one's own choice, at least one, each with a token to score; of `options`
// context (what a full window has), chunk, batch and type of the cache count.
PerplexityResult score_windows(models::Model& model, std::unique_ptr<cache::Policy> policy,
                               const Streams& streams, std::span<const Window> windows,
                               const PerplexityOptions& options, const Progress& progress = {});

}  // namespace natslm::eval
