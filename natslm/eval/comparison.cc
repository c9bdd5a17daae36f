// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/comparison.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "natslm/base/error.h"

namespace natslm::eval {
namespace {

constexpr double kCloseEnough = 0.01;   // of the budget
constexpr int64_t kPilotTokens = 4096;  // to measure a budget on; one window at least

// The first full windows of the streams, each as a stream of its own; the longest stream if none is
// full.
Streams pilot(const Streams& streams, int64_t context) {
  Streams few;
  int64_t total = 0;
  const std::vector<int32_t>* longest = nullptr;
  for (const auto& stream : streams) {
    if (longest == nullptr || stream.size() > longest->size()) longest = &stream;
    for (int64_t begin = 0; begin + context <= static_cast<int64_t>(stream.size());
         begin += context) {
      if (total > 0 && total + context > kPilotTokens) return few;
      few.emplace_back(stream.begin() + begin, stream.begin() + begin + context);
      total += context;
    }
  }
  if (few.empty() && longest != nullptr) few.push_back(*longest);
  return few;
}

std::string percent(double share) {
  return policies::shortest(std::round(share * 1e4) / 1e2) + " %";
}

// Measures KV at end on the pilot windows and remembers what came nearest to the budget.
class Search {
 public:
  Search(models::Model& model, double budget, const Streams& streams,
         const PerplexityOptions& options, uint64_t seed)
      : model_(model), budget_(budget), options_(options), seed_(seed) {
    if (options_.context == 0) options_.context = model.config().context;
    options_.stride = 0;
    options_.max_tokens = 0;
    windows_ = pilot(streams, options_.context);
    NATSLM_CHECK(!windows_.empty(), "there is no text to measure a budget on");
    length_ = static_cast<int32_t>(windows_.front().size());
    options_.continuous = false;
    options_.context = length_;
  }

  double measure(const std::string& spec) {
    auto policy =
        policies::make_policy(spec, policy_context(model_, length_, seed_, options_.cache_dtype));
    const double share = perplexity(model_, std::move(policy), windows_, options_).kv_end;
    if (best_.empty() || std::abs(share - budget_) < std::abs(best_share_ - budget_)) {
      best_ = spec;
      best_share_ = share;
    }
    lowest_ = std::min(lowest_, share);
    highest_ = std::max(highest_, share);
    return share;
  }

  bool close() const {
    return !best_.empty() && std::abs(best_share_ - budget_) <= kCloseEnough * budget_;
  }
  const std::string& best() const { return best_; }
  double best_share() const { return best_share_; }
  double lowest() const { return lowest_; }
  double highest() const { return highest_; }
  int32_t length() const { return length_; }

 private:
  models::Model& model_;
  double budget_;
  PerplexityOptions options_;
  uint64_t seed_;
  Streams windows_;
  int32_t length_ = 0;
  std::string best_;
  double best_share_ = 0, lowest_ = 1, highest_ = 0;
};

// Counts of keys: what a policy keeps beyond its own arithmetic (a chunk not yet thinned out, the
// drawn share) is taken off the number it is given.
void search_count(std::string_view spec, double budget, Search& search) {
  double given = budget;
  for (int round = 0; round < 4 && !search.close(); ++round) {
    const double measured = search.measure(policies::with_budget(spec, given, search.length()));
    given = std::clamp(given + budget - measured, 1.0 / search.length(), 1.0);
  }
}

// The bias of learned roles: the higher, the fewer keys. The share falls with it, nearly
// monotonously.
void search_bias(double budget, Search& search) {
  const auto at = [](double bias) {
    return "learned:bias=" + policies::shortest(std::round(bias * 1e4) / 1e4);
  };
  double low = 0, high = 0;  // biases whose shares lie above and below the budget
  double share = search.measure(at(0));
  for (double width = 1; width <= 64 && !search.close(); width *= 2) {
    if (share > budget) {
      low = high;
      high += width;
      share = search.measure(at(high));
      if (share <= budget) break;
    } else {
      high = low;
      low -= width;
      share = search.measure(at(low));
      if (share > budget) break;
    }
  }
  for (int round = 0; round < 16 && !search.close(); ++round) {
    const double middle = (low + high) / 2;
    (search.measure(at(middle)) > budget ? low : high) = middle;
  }
}

}  // namespace

policies::PolicyContext policy_context(const models::Model& model, int32_t context, uint64_t seed,
                                       at::ScalarType cache_dtype) {
  policies::PolicyContext result;
  result.shape = model.cache_shape(cache_dtype);
  result.roles = model.config().roles;
  result.context = context > 0 ? context : model.config().context;
  result.calibration = model.calibration();
  result.seed = seed;
  return result;
}

bool has_budget(std::string_view spec) {
  return policies::Spec(spec).name() != "full";
}

std::string spec_at_budget(models::Model& model, std::string_view spec, double budget,
                           const Streams& streams, const PerplexityOptions& options,
                           uint64_t seed) {
  NATSLM_CHECK(budget > 0 && budget <= 1, "a KV budget of ", budget,
               " is not possible: give a share of the keys above 0 and up to 1");
  Search search(model, budget, streams, options, seed);
  if (policies::Spec(spec).name() == "learned") {
    search_bias(budget, search);
    NATSLM_CHECK(std::abs(search.best_share() - budget) <= 0.1 * budget,
                 "policy learned cannot keep ", percent(budget), " of the keys of ",
                 search.length(), " tokens: its budget bias reaches ", percent(search.lowest()),
                 " to ", percent(search.highest()));
  } else {
    search_count(spec, budget, search);
  }
  return search.best();
}

double share_of(const policies::KeyBudget& budget, const models::Model& model, int32_t tokens) {
  const models::Config& config = model.config();
  const double all = double(tokens) * config.layers * config.kv_heads;
  return budget.keys > 0 ? std::min(1.0, static_cast<double>(budget.keys) / all) : budget.share;
}

std::string spec_under_budget(models::Model& model, std::string_view spec,
                              const policies::KeyBudget& budget, double kv_end,
                              const Streams& streams, const PerplexityOptions& options,
                              uint64_t seed, const roles::Calibration* calibration) {
  policies::Spec learned(spec);
  if (!learned.has("bias") && calibration == nullptr) {
    Search search(model, kv_end, streams, options, seed);
    // Window and token are there whatever the bias; a few times as many tokens say something of it.
    if (search.length() >= 8 * (int64_t{model.config().roles.window} + 1)) {
      search_bias(kv_end, search);
      learned.set("bias",
                  policies::shortest(policies::Spec(search.best()).number("bias", 0, -1e6, 1e6)));
    }
  }
  if (budget.share > 0) learned.set("budget", policies::shortest(budget.share));
  if (budget.keys > 0) learned.set("keys", std::to_string(budget.keys));
  return learned.text();
}

void evaluate_each(const std::vector<Contender>& contenders, const Streams& streams,
                   const PerplexityOptions& options, uint64_t seed, const Evaluate& evaluate) {
  for (const Contender& contender : contenders) {
    models::Model& model = *contender.model;
    const policies::PolicyContext about =
        policy_context(model, options.context, seed, options.cache_dtype);
    const double budget = share_of(contender.budget, model, about.context);
    std::string spec = contender.spec;
    if (budget > 0 && policies::Spec(spec).name() == "learned") {
      spec = spec_under_budget(model, spec, contender.budget, budget, streams, options, seed,
                               about.calibration);
    } else if (budget > 0 && has_budget(spec)) {
      spec = spec_at_budget(model, spec, budget, streams, options, seed);
    }
    evaluate(model, policies::make_policy(spec, about));
  }
}

double evaluate_at_equal_budget(models::Model& model, const std::string& learned,
                                models::Model& rival_model, const std::vector<std::string>& rivals,
                                const Streams& streams, const PerplexityOptions& options,
                                uint64_t seed, const Evaluate& evaluate) {
  double budget = 0;
  evaluate_each({{"full", &rival_model}, {learned, &model}}, streams, options, seed,
                [&](models::Model& which, std::unique_ptr<cache::Policy> policy) {
                  return budget = evaluate(which, std::move(policy));
                });
  std::vector<Contender> contenders;
  for (const std::string& rival : rivals) contenders.push_back({rival, &rival_model, {budget, 0}});
  evaluate_each(contenders, streams, options, seed, evaluate);
  return budget;
}

namespace {

// Perplexity as what a comparison does; results are told and collected.
Evaluate perplexity_of(const Streams& streams, const PerplexityOptions& options,
                       const std::function<void(const PerplexityResult&)>& on_result,
                       const Progress& progress, std::vector<PerplexityResult>& results) {
  return [&](models::Model& model, std::unique_ptr<cache::Policy> policy) {
    results.push_back(perplexity(model, std::move(policy), streams, options, progress));
    if (on_result) on_result(results.back());
    return results.back().kv_end_full;
  };
}

}  // namespace

std::vector<PerplexityResult> compare(const std::vector<Contender>& contenders,
                                      const Streams& streams, const PerplexityOptions& options,
                                      uint64_t seed,
                                      const std::function<void(const PerplexityResult&)>& on_result,
                                      const Progress& progress) {
  std::vector<PerplexityResult> results;
  evaluate_each(contenders, streams, options, seed,
                perplexity_of(streams, options, on_result, progress, results));
  return results;
}

std::vector<PerplexityResult> compare_at_equal_budget(
    models::Model& model, const std::string& learned, models::Model& rival_model,
    const std::vector<std::string>& rivals, const Streams& streams,
    const PerplexityOptions& options, uint64_t seed,
    const std::function<void(const PerplexityResult&)>& on_result, const Progress& progress) {
  std::vector<PerplexityResult> results;
  evaluate_at_equal_budget(model, learned, rival_model, rivals, streams, options, seed,
                           perplexity_of(streams, options, on_result, progress, results));
  return results;
}

}  // namespace natslm::eval
