// How much the cache holds: a model with random weights and a long context, its roles drawn so that
// a given share of the keys lives, read in chunks and then token by token. After every step the
// bytes of pages in use are compared with those of live keys, and the cache's own account with what
// it really allocated. Then the peak of the same text under `full`. One JSON line.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <memory_resource>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/eval/comparison.h"
#include "natslm/eval/perplexity.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/models/models.h"
#include "natslm/policies/policies.h"

namespace {

using namespace natslm;

constexpr int32_t kContext = 16384, kDecode = 512, kChunk = 64;
constexpr double kShare = 0.10;

// Counts what passes through it.
class Counting final : public std::pmr::memory_resource {
 public:
  int64_t held() const { return held_; }

 private:
  void* do_allocate(size_t bytes, size_t alignment) override {
    held_ += static_cast<int64_t>(bytes);
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, size_t bytes, size_t alignment) override {
    held_ -= static_cast<int64_t>(bytes);
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
  int64_t held_ = 0;
};

std::unique_ptr<models::Model> random_model() {
  models::Config config = models::preset("tiny").config;
  config.context = kContext;
  config.roles.window = 64;
  return models::make_model(config, 1);
}

std::vector<int32_t> random_tokens(int32_t vocabulary) {
  std::vector<int32_t> tokens(kContext);
  for (int32_t i = 0; i < kContext; ++i) tokens[i] = static_cast<int32_t>(mix64(i) % vocabulary);
  return tokens;
}

struct Overhead {
  double worst_ratio = 0;      // (held - two pages a head) / live, after any step
  double mean_ratio = 0;       // held / live
  int64_t account_errors = 0;  // steps after which the account was not what the allocator said
  int64_t steps = 0;
};

// Feeds the whole context, the last kDecode tokens one by one.
Overhead overhead(models::Model& model, const std::string& spec,
                  const std::vector<int32_t>& tokens) {
  const at::NoGradGuard no_grad;
  Counting memory;
  const cache::Shape shape = model.cache_shape();
  cache::KvCache cache(shape, policies::make_policy(spec, eval::policy_context(model)), &memory);
  const int32_t slot = cache.add_sequence();
  const int64_t page = kernels::page_bytes(shape.head_dim, DType::kFloat32);
  Overhead result;
  for (int32_t at = 0; at < kContext;) {
    const int32_t rows = at < kContext - kDecode ? kChunk : 1;
    models::StepInput input;
    input.step.slots = {slot};
    input.step.row_start = {0, rows};
    std::vector<int64_t> wide(tokens.begin() + at, tokens.begin() + at + rows);
    input.tokens = at::from_blob(wide.data(), {rows}, at::kLong).clone();
    input.last_row_only = true;
    model.step(input, cache);
    at += rows;
    const cache::Usage usage = cache.usage();
    const double slack = 2.0 * static_cast<double>(page) * shape.layers * shape.kv_heads;
    const double live = static_cast<double>(usage.live_bytes),
                 held = static_cast<double>(usage.held_bytes);
    result.worst_ratio = std::max(result.worst_ratio, (held - slack) / live);
    result.mean_ratio += held / live;
    result.account_errors += usage.held_bytes != memory.held();
    ++result.steps;
  }
  result.mean_ratio /= static_cast<double>(result.steps);
  return result;
}

}  // namespace

int main() {
  const auto model = random_model();
  const std::vector<int32_t> tokens = random_tokens(model->config().vocabulary);

  // The bias that gives the share is looked for on a shorter text; what counts is what is measured
  // below.
  const eval::Streams few{{tokens.begin(), tokens.begin() + 4096}};
  const std::string spec = eval::spec_at_budget(*model, "learned", kShare, few, {.context = 4096});
  const Overhead cache = overhead(*model, spec, tokens);

  const eval::PerplexityOptions options{.prefill_chunk = kChunk, .batch = 1};
  const auto run = [&](const std::string& policy) {
    return eval::perplexity(*model, policies::make_policy(policy, eval::policy_context(*model)),
                            {tokens}, options);
  };
  const eval::PerplexityResult some = run(spec), full = run("full");
  std::printf(
      "{\"command\": \"cache_memory\", \"device\": \"cpu, %d threads\", \"settings\": "
      "{\"context\": %d, "
      "\"decode_tokens\": %d, \"prefill_chunk\": %d, \"policy\": \"%s\"}, \"results\": "
      "{\"kv_end\": %.4f, "
      "\"steps\": %lld, \"held_over_live_beyond_two_pages\": %.4f, \"held_over_live_mean\": %.4f, "
      "\"steps_with_wrong_account\": %lld, \"eval_kv_bytes_peak\": %lld, "
      "\"eval_kv_bytes_peak_full\": %lld, "
      "\"peak_share\": %.4f, \"kv_bytes_mean\": %.0f, \"tokens_per_s\": %.0f, "
      "\"tokens_per_s_full\": %.0f}}\n",
      at::get_num_threads(), kContext, kDecode, kChunk, spec.c_str(), some.kv_end,
      static_cast<long long>(cache.steps), cache.worst_ratio, cache.mean_ratio,
      static_cast<long long>(cache.account_errors), static_cast<long long>(some.kv_bytes_peak),
      static_cast<long long>(full.kv_bytes_peak),
      static_cast<double>(some.kv_bytes_peak) / static_cast<double>(full.kv_bytes_peak),
      some.kv_bytes_mean, static_cast<double>(some.tokens) / some.seconds,
      static_cast<double>(full.tokens) / full.seconds);
  return 0;
}
