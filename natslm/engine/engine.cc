// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/engine.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/log_softmax.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/engine/text_stream.h"

namespace natslm::engine {

std::string_view name(Finish finish) {
  switch (finish) {
    case Finish::kLength:
      return "length";
    case Finish::kEndOfText:
      return "end_of_text";
    case Finish::kStopString:
      return "stop";
    case Finish::kContextFull:
      return "context_full";
    case Finish::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

// A request at work. Either `generation` or `scoring` is set.
struct Engine::Sequence {
  int64_t id = 0;
  int32_t slot = -1;            // in the cache; -1 while waiting
  std::vector<int32_t> tokens;  // the prompt and what was generated, or the text to score
  int64_t prompt = 0;           // leading tokens that are fed in chunks
  int64_t fed = 0;              // that went through the model
  bool done = false;

  std::optional<GenerationRequest> generation;
  Generated generated;
  TextStream text;

  std::optional<ScoreRequest> scoring;
  Scored scored;

  double bytes_sum = 0;  // held bytes after a token's step, summed over tokens
  int64_t bytes_peak = 0;

  // Text positions [first, second) whose predecessors are among the next `rows` rows and that get a
  // score.
  std::pair<int64_t, int64_t> scored_by(int64_t rows) const {
    if (!scoring) return {0, 0};
    const int64_t begin = std::max(fed + 1, scoring->first_scored);
    const int64_t end = std::min<int64_t>(fed + rows + 1, tokens.size());
    return {begin, std::max(begin, end)};
  }
};

// What one step is made of.
struct Engine::Rows {
  std::vector<Sequence*> sequences;
  models::StepInput input;
  int64_t count(size_t index) const {
    return input.step.row_start[index + 1] - input.step.row_start[index];
  }
  // Row of the logits that belongs to a row of the step; of its last row if there are only those.
  int64_t logits_row(size_t index, int64_t row) const {
    return input.last_row_only ? static_cast<int64_t>(index) : input.step.row_start[index] + row;
  }
};

namespace {

at::Device device_of(const models::Model& model) {
  return model.parameters().empty() ? at::Device(at::kCPU)
                                    : model.parameters().front().second.device();
}

cache::Shape cache_shape(const models::Model& model, at::ScalarType dtype) {
  const at::Device device = device_of(model);
  if (dtype == at::ScalarType::Undefined) dtype = device.is_cpu() ? at::kFloat : at::kBFloat16;
  cache::Shape shape = model.cache_shape(dtype);
  shape.device = device;
  return shape;
}

}  // namespace

Engine::Engine(models::Model& model, std::unique_ptr<cache::Policy> policy,
               const data::Tokenizer* tokenizer, const Options& options)
    : model_(model),
      tokenizer_(tokenizer),
      options_(options),
      account_(new KeyAccount(std::move(policy), cache_shape(model, options.cache_dtype))),
      cache_(cache_shape(model, options.cache_dtype), std::unique_ptr<cache::Policy>(account_)) {
  NATSLM_CHECK(options.prefill_chunk >= 1, "a prefill chunk of ", options.prefill_chunk,
               " tokens is not possible: give 1 or more");
  NATSLM_CHECK(options.max_sequences >= 1 && options.max_step_rows >= 1, "max_sequences ",
               options.max_sequences, " and max_step_rows ", options.max_step_rows,
               " must be 1 or more");
  const int32_t limit = account_->chunk_limit();
  chunk_ = limit > 0 ? std::min(limit, options.prefill_chunk) : options.prefill_chunk;
}

Engine::~Engine() = default;

at::Tensor Engine::to_device(const std::vector<int64_t>& numbers) const {
  // The memory below is the vector's own: the copy is made at once.
  auto* data = const_cast<int64_t*>(numbers.data());
  return at::from_blob(data, {std::ssize(numbers)}, at::kLong)
      .to(cache_.shape().device, at::kLong, /*non_blocking=*/false, /*copy=*/true);
}

void Engine::check_length(int64_t tokens) const {
  const int32_t context = model_.config().context;
  NATSLM_CHECK(tokens <= context || account_->renumbers(), "a text of ", tokens,
               " tokens is longer than the context this model was built for (", context,
               "): shorten it, or use a policy that renumbers positions");
}

int64_t Engine::enqueue(std::unique_ptr<Sequence> sequence) {
  const int32_t vocabulary = model_.config().vocabulary;
  for (const int32_t token : sequence->tokens) {
    NATSLM_CHECK(token >= 0 && token < vocabulary, "token ", token,
                 " is not in the model's vocabulary of ", vocabulary,
                 ": use the tokenizer the model was trained with");
  }
  check_length(static_cast<int64_t>(sequence->tokens.size()));
  sequence->id = next_id_++;
  waiting_.push_back(std::move(sequence));
  return next_id_ - 1;
}

int64_t Engine::submit(GenerationRequest request) {
  check(request.options.sampling);
  NATSLM_CHECK(!request.prompt.empty(), "the prompt is empty: give at least one token of text");
  NATSLM_CHECK(request.options.max_new_tokens >= 1, "max_new_tokens ",
               request.options.max_new_tokens, " is not allowed: give 1 or more");
  NATSLM_CHECK(request.options.stop.empty() || tokenizer_ != nullptr,
               "stop strings need a tokenizer");
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = request.prompt;
  sequence->prompt = static_cast<int64_t>(request.prompt.size());
  sequence->generated.prompt_tokens = sequence->prompt;
  sequence->text = TextStream(request.options.stop);
  sequence->generation = std::move(request);
  return enqueue(std::move(sequence));
}

int64_t Engine::submit(ScoreRequest request) {
  const int64_t size = static_cast<int64_t>(request.tokens.size());
  NATSLM_CHECK(
      request.first_scored >= 1 && request.first_scored < size, "tokens from number ",
      request.first_scored, " of ", size,
      " cannot be scored: a token needs one before it, and one token at least must be scored");
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = std::move(request.tokens);
  sequence->prompt = size;
  sequence->scored.log_probabilities.reserve(size - request.first_scored);
  sequence->scoring = std::move(request);
  return enqueue(std::move(sequence));
}

void Engine::cancel(int64_t request) {
  const auto end_it = [&](const std::unique_ptr<Sequence>& sequence) {
    if (sequence->id != request || sequence->done) return;
    sequence->done = true;
    sequence->generated.finish = Finish::kCancelled;
  };
  std::ranges::for_each(working_, end_it);
  std::ranges::for_each(waiting_, end_it);
}

void Engine::admit() {
  while (!waiting_.empty() && static_cast<int32_t>(working_.size()) < options_.max_sequences) {
    working_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
    if (!working_.back()->done) working_.back()->slot = cache_.add_sequence();
  }
}

// Sequences that decode come first (a row each), then prompts in the order of their arrival while
// there is room. A chunk is never cut to fit: where it ends may be part of a policy's definition.
Engine::Rows Engine::plan() {
  Rows rows;
  rows.input.step.row_start.push_back(0);
  std::vector<int64_t> tokens;
  bool all_rows = false;
  const auto add = [&](Sequence& sequence, int64_t count) {
    const int64_t total = rows.input.step.row_start.back();
    if (total > 0 && total + count > options_.max_step_rows) return;
    rows.sequences.push_back(&sequence);
    rows.input.step.slots.push_back(sequence.slot);
    rows.input.step.row_start.push_back(static_cast<int32_t>(total + count));
    tokens.insert(tokens.end(), sequence.tokens.begin() + sequence.fed,
                  sequence.tokens.begin() + sequence.fed + count);
    const auto [first, end] = sequence.scored_by(count);
    all_rows |= first < end && first < sequence.fed + count;
  };
  for (const auto& sequence : working_) {
    if (!sequence->done && sequence->fed >= sequence->prompt) add(*sequence, 1);
  }
  for (const auto& sequence : working_) {
    const int64_t left = sequence->prompt - sequence->fed;
    if (!sequence->done && left > 0) add(*sequence, std::min<int64_t>(left, chunk_));
  }
  rows.input.last_row_only = !all_rows;
  rows.input.tokens = to_device(tokens);
  return rows;
}

void Engine::account_bytes(const Rows& rows) {
  const cache::Usage after = cache_.usage();
  const cache::Usage highest = cache_.peak();
  peak_.live_keys = std::max(peak_.live_keys, highest.live_keys);
  peak_.live_bytes = std::max(peak_.live_bytes, highest.live_bytes);
  peak_.held_bytes = std::max(peak_.held_bytes, highest.held_bytes);
  peak_.metadata_bytes = std::max(peak_.metadata_bytes, highest.metadata_bytes);
  // What was held inside the step only, shared by rows: the sequences' sum is the step's true peak.
  const double passing =
      static_cast<double>(std::max<int64_t>(0, highest.held_bytes - after.held_bytes)) /
      rows.input.step.row_start.back();
  for (size_t i = 0; i < rows.sequences.size(); ++i) {
    Sequence& sequence = *rows.sequences[i];
    const int64_t held = cache_.usage(sequence.slot).held_bytes;
    const int64_t count = rows.count(i);
    sequence.bytes_sum += static_cast<double>(held) * count;
    sequence.bytes_peak = std::max(
        sequence.bytes_peak, held + static_cast<int64_t>(passing * static_cast<double>(count)));
  }
}

bool Engine::step() {
  admit();
  finish_done();  // those that were cancelled
  admit();
  if (working_.empty()) return !waiting_.empty();
  const at::NoGradGuard no_grad;
  const auto begin = std::chrono::steady_clock::now();
  cache_.reset_peak();
  Rows rows = plan();
  const at::Tensor logits = model_.step(rows.input, cache_);
  account_bytes(rows);
  score_rows(rows, logits);
  for (size_t i = 0; i < rows.sequences.size(); ++i) {
    Sequence& sequence = *rows.sequences[i];
    sequence.fed += rows.count(i);
    if (sequence.generation && sequence.fed == sequence.prompt)
      cache_.finish_prefill(sequence.slot);
    if (sequence.scoring && sequence.fed == sequence.prompt) sequence.done = true;
  }
  sample_rows(rows, logits);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  for (Sequence* sequence : rows.sequences) {
    if (sequence->scoring) {
      sequence->scored.seconds += seconds;
    } else if (sequence->fed <= sequence->prompt) {
      sequence->generated.prefill_seconds += seconds;
    } else {
      sequence->generated.decode_seconds += seconds;
    }
  }
  finish_done();
  return true;
}

void Engine::score_rows(const Rows& rows, const at::Tensor& logits) {
  std::vector<int64_t> index, target;  // row of the logits, token that follows it
  for (size_t i = 0; i < rows.sequences.size(); ++i) {
    const Sequence& sequence = *rows.sequences[i];
    const auto [first, end] = sequence.scored_by(rows.count(i));
    for (int64_t position = first; position < end; ++position) {
      index.push_back(rows.logits_row(i, position - 1 - sequence.fed));
      target.push_back(sequence.tokens[position]);
    }
  }
  if (index.empty()) return;
  const int64_t count = static_cast<int64_t>(index.size());
  const at::Tensor picked =
      count == logits.size(0) ? logits : logits.index_select(0, to_device(index));
  const at::Tensor scores = at::log_softmax(picked, -1, at::kFloat)
                                .gather(1, to_device(target).unsqueeze(1))
                                .cpu()
                                .contiguous();
  const bool want_best = std::ranges::any_of(rows.sequences, [](const Sequence* sequence) {
    return sequence->scoring && sequence->scoring->want_best;
  });
  const at::Tensor best =
      want_best ? picked.argmax(-1).to(at::kInt).cpu().contiguous() : at::Tensor();
  const float* next = scores.const_data_ptr<float>();
  const int32_t* next_best = want_best ? best.const_data_ptr<int32_t>() : nullptr;
  for (size_t i = 0; i < rows.sequences.size(); ++i) {
    Sequence& sequence = *rows.sequences[i];
    const auto [first, end] = sequence.scored_by(rows.count(i));
    auto& into = sequence.scored.log_probabilities;
    into.insert(into.end(), next, next + (end - first));
    next += end - first;
    if (!want_best) continue;
    if (sequence.scoring && sequence.scoring->want_best)
      sequence.scored.best.insert(sequence.scored.best.end(), next_best, next_best + (end - first));
    next_best += end - first;
  }
}

void Engine::sample_rows(const Rows& rows, const at::Tensor& logits) {
  std::vector<Sequence*> sampled;
  std::vector<int64_t> index;  // rows of the logits
  for (size_t i = 0; i < rows.sequences.size(); ++i) {
    Sequence& sequence = *rows.sequences[i];
    if (!sequence.generation || sequence.done || sequence.fed < sequence.prompt) continue;
    sampled.push_back(&sequence);
    index.push_back(rows.logits_row(i, rows.count(i) - 1));
  }
  if (index.empty()) return;
  // One copy to the host for all sequences.
  const at::Tensor picked =
      logits.index_select(0, to_device(index)).to(at::kFloat).cpu().contiguous();
  const float* row = picked.const_data_ptr<float>();
  for (Sequence* sequence : sampled) {
    take(*sequence,
         sample({row, static_cast<size_t>(picked.size(1))}, sequence->generation->options.sampling,
                static_cast<int64_t>(sequence->tokens.size())));
    row += picked.size(1);
  }
}

void Engine::take(Sequence& sequence, int32_t token) {
  const GenerationOptions& options = sequence.generation->options;
  Generated& result = sequence.generated;
  const auto finish = [&](Finish reason) {
    sequence.done = true;
    result.finish = reason;
  };
  sequence.tokens.push_back(token);
  result.tokens.push_back(token);
  const bool end_of_text = options.stop_at_end_of_text &&
                           ((tokenizer_ != nullptr && token == tokenizer_->end_of_text()) ||
                            std::ranges::count(model_.config().end_tokens, token) > 0);
  std::string piece;
  if (tokenizer_ != nullptr && !end_of_text)
    piece = sequence.text.push(tokenizer_->token_bytes(token));

  if (end_of_text) {
    finish(Finish::kEndOfText);
  } else if (sequence.text.stopped()) {
    finish(Finish::kStopString);
  } else if (static_cast<int32_t>(result.tokens.size()) >= options.max_new_tokens) {
    finish(Finish::kLength);
  } else if (static_cast<int64_t>(sequence.tokens.size()) > model_.config().context &&
             !account_->renumbers()) {
    finish(Finish::kContextFull);  // the new token has no position to be fed at
  }
  if (sequence.done) piece += sequence.text.finish();
  result.text += piece;
  if (sequence.generation->on_token) {
    sequence.generation->on_token({token, static_cast<int64_t>(sequence.tokens.size()) - 1, piece});
  }
}

KeyUse Engine::use_of(const Sequence& sequence) const {
  KeyUse use;
  if (sequence.fed == 0) return use;
  const KeyShares shares = account_->shares(sequence.slot);
  use.tokens = sequence.fed;
  use.live_keys = cache_.usage(sequence.slot).live_keys;
  use.kv_end = shares.at_end;
  use.kv_mean = shares.mean;
  use.demoted = account_->demoted(sequence.slot);
  use.kv_peak_over_cap = shares.peak_over_cap;
  use.kv_bytes_mean = sequence.bytes_sum / static_cast<double>(sequence.fed);
  use.kv_bytes_peak = sequence.bytes_peak;
  return use;
}

void Engine::finish_done() {
  const auto first_done = std::stable_partition(
      working_.begin(), working_.end(), [](const auto& sequence) { return !sequence->done; });
  std::vector<std::unique_ptr<Sequence>> finished(std::make_move_iterator(first_done),
                                                  std::make_move_iterator(working_.end()));
  working_.erase(first_done, working_.end());
  // Callbacks last: they may submit and cancel.
  for (const auto& sequence : finished) {
    if (sequence->slot < 0) continue;
    sequence->generated.use = sequence->scored.use = use_of(*sequence);
    if (sequence->generation && sequence->generation->inspect) {
      sequence->generation->inspect(cache_, sequence->slot);
    }
    cache_.remove_sequence(sequence->slot);
  }
  for (const auto& sequence : finished) {
    if (sequence->generation) {
      if (sequence->generated.finish == Finish::kCancelled) {
        sequence->generated.text += sequence->text.finish();
      }
      if (sequence->generation->on_done)
        sequence->generation->on_done(std::move(sequence->generated));
    } else if (sequence->fed == sequence->prompt && sequence->scoring->on_done) {
      sequence->scoring->on_done(std::move(sequence->scored));
    }
  }
}

Generated Engine::generate(GenerationRequest request) {
  std::optional<Generated> result;
  request.on_done = [&, then = std::move(request.on_done)](Generated generated) {
    if (then) then(generated);
    result = std::move(generated);
  };
  submit(std::move(request));
  while (!result && step()) {
  }
  NATSLM_CHECK(result, "the request was cancelled");
  return std::move(*result);
}

Scored Engine::score(ScoreRequest request) {
  std::optional<Scored> result;
  request.on_done = [&, then = std::move(request.on_done)](Scored scored) {
    if (then) then(scored);
    result = std::move(scored);
  };
  submit(std::move(request));
  while (!result && step()) {
  }
  NATSLM_CHECK(result, "the request was cancelled");
  return std::move(*result);
}

}  // namespace natslm::engine
