// Runs a model over many sequences at once: they join and leave between steps, each with its own
// length, prompts in chunks, then one token a step. Typed requests in, callbacks out; no HTTP, no
// JSON.
//
// One thread owns the engine, with its model and cache: no call is safe from a second one. What a
// sequence gets does not depend on its neighbours (but for the rounding of larger matrix products).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/data/tokenizer.h"
#include "natslm/engine/key_account.h"
#include "natslm/engine/sampler.h"
#include "natslm/models/model.h"

namespace natslm::engine {

struct Options {
  int32_t prefill_chunk = 64;    // tokens of a prompt per step; a policy may want fewer
  int32_t max_sequences = 16;    // at work at the same time; the others wait their turn
  int32_t max_step_rows = 1024;  // tokens of all sequences in a step (one chunk always fits)
  // Of stored keys and values: float or bfloat16. Undefined: float on the CPU, and on a GPU
  // bfloat16, which is all it takes.
  at::ScalarType cache_dtype = at::ScalarType::Undefined;
};

struct GenerationOptions {
  int32_t max_new_tokens = 256;  // stop after this many new tokens
  Sampling sampling;
  std::vector<std::string> stop;  // stop before the first of these texts; needs a tokenizer
  // The tokenizer's end-of-text token, and those that the model's files name, end the answer.
  bool stop_at_end_of_text = true;
};

enum class Finish : uint8_t { kLength, kEndOfText, kStopString, kContextFull, kCancelled };
std::string_view name(
    Finish finish);  // "length", "end_of_text", "stop", "context_full", "cancelled"

// What a sequence kept in the cache, exactly. Bytes are those of the pages it held (keys and
// values; metadata apart).
struct KeyUse {
  int64_t tokens = 0;     // that went through the model
  int64_t live_keys = 0;  // after the last step, over all layers and KV heads
  double kv_end = 0;      // share of the keys that the last token's query can read, itself included
  double kv_mean = 0;     // mean over all queries of (keys it can read / keys so far)
  int64_t demoted = 0;    // keys that were given up to keep a budget (Policy::demoted)
  double kv_peak_over_cap = 0;  // KeyShares::peak_over_cap
  double kv_bytes_mean = 0;     // mean over tokens of the bytes held after their step
  int64_t kv_bytes_peak = 0;    // highest, inside steps too; see Engine on batches
};

// A new token, told at once.
struct NewToken {
  int32_t id = 0;
  int64_t position = 0;
  std::string_view text;  // what may be shown now: whole characters; empty without a tokenizer
};

struct Generated {
  std::vector<int32_t> tokens;  // new ones; a final end-of-text token is among them
  std::string text;             // theirs, up to a stop string
  Finish finish = Finish::kLength;
  int64_t prompt_tokens = 0;
  double prefill_seconds = 0;  // of the steps that took the prompt in
  double decode_seconds = 0;   // of the steps of one token
  KeyUse use;
};

struct GenerationRequest {
  std::vector<int32_t> prompt;
  GenerationOptions options;
  std::function<void(const NewToken&)> on_token;  // may be empty
  std::function<void(Generated)> on_done;         // may be empty
  // Called once when the answer is complete, while its keys are still in the cache; may be empty.
  std::function<void(const cache::KvCache& cache, int32_t slot)> inspect;
};

struct Scored {
  std::vector<float> log_probabilities;  // natural; of tokens[first_scored ..]
  std::vector<int32_t> best;  // the most probable token in each one's place, if asked for
  double seconds = 0;         // of the steps it took part in
  KeyUse use;
};

// The log-probabilities the model gives to a text it is handed token by token, through the cache.
struct ScoreRequest {
  std::vector<int32_t> tokens;  // at least two
  int64_t first_scored = 1;  // tokens before this one are context only; the first never has a score
  bool want_best = false;    // also say which token was the most probable
  std::function<void(Scored)> on_done;
};

class Engine {
 public:
  // `model` and `tokenizer` (may be null) must outlive the engine; the cache lies on the device the
  // model is on, which must stay the same. Throws Error for impossible options.
  Engine(models::Model& model, std::unique_ptr<cache::Policy> policy,
         const data::Tokenizer* tokenizer = nullptr, const Options& options = {});
  ~Engine();

  // Queue a request; returns its number. Throws Error for input that can never work: an empty
  // prompt, a token outside the vocabulary, a text longer than the model's context (unless the
  // policy renumbers).
  int64_t submit(GenerationRequest request);
  int64_t submit(ScoreRequest request);
  // Ends a request early: a generation's on_done is called with what it has (Finish::kCancelled), a
  // score's is not. Unknown numbers are ignored. May be called from callbacks, as submit may.
  void cancel(int64_t request);

  // One step of the model for the sequences at work. False if nothing was left to do.
  bool step();
  void run() {
    while (step()) {
    }
  }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t working() const { return static_cast<int64_t>(working_.size()); }

  // One request from beginning to end (with whatever else is queued).
  Generated generate(GenerationRequest request);
  Scored score(ScoreRequest request);

  const cache::KvCache& cache() const { return cache_; }
  // Highest values over all sequences so far, inside steps too. The peak of one sequence of a batch
  // (KeyUse) is its own pages after a step plus its share, by rows, of what the step held in
  // passing.
  cache::Usage peak() const { return peak_; }
  // Tokens of a prompt per step, after the policy's limit.
  int32_t prefill_chunk() const { return chunk_; }

 private:
  struct Sequence;
  struct Rows;
  int64_t enqueue(std::unique_ptr<Sequence> sequence);
  void check_length(int64_t tokens) const;
  void admit();
  Rows plan();
  void account_bytes(const Rows& rows);
  void score_rows(const Rows& rows, const at::Tensor& logits);
  void sample_rows(const Rows& rows, const at::Tensor& logits);
  void take(Sequence& sequence, int32_t token);
  at::Tensor to_device(const std::vector<int64_t>& numbers) const;
  void finish_done();
  KeyUse use_of(const Sequence& sequence) const;

  models::Model& model_;
  const data::Tokenizer* tokenizer_;
  Options options_;
  KeyAccount* account_;  // owned by cache_
  cache::KvCache cache_;
  int32_t chunk_ = 0;
  int64_t next_id_ = 0;
  cache::Usage peak_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> working_;  // in the order they were admitted
};

}  // namespace natslm::engine
