// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/policies.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/policies/full.h"
#include "natslm/policies/h2o.h"
#include "natslm/policies/learned.h"
#include "natslm/policies/random.h"
#include "natslm/policies/streaming.h"

namespace natslm::policies {
namespace {

std::unique_ptr<cache::Policy> make_full(const Spec&, const PolicyContext&) {
  return std::make_unique<Full>();
}

constexpr Entry kPolicies[] = {
    {"full", "evicts nothing", {}, make_full},
    {"learned", "the model's own roles", kLearnedOptions, make_learned},
    {"streaming", "first tokens and a window, at their places in the cache (StreamingLLM)",
     kStreamingOptions, make_streaming},
    {"streaming-original", "first tokens and a window, at their positions in the text",
     kStreamingOptions, make_streaming_original},
    {"h2o", "the keys that received most attention, and a window (H2O)", kH2oOptions, make_h2o},
    {"random", "first tokens, a window and a random sample", kRandomOptions, make_random},
};

const Entry& find(const Spec& spec) {
  const auto found = std::ranges::find(kPolicies, spec.name(), &Entry::name);
  if (found != std::end(kPolicies)) return *found;
  std::vector<std::string_view> names;
  for (const Entry& entry : kPolicies) names.push_back(entry.name);
  fail("unknown policy \"", spec.name(), "\"; known are ", list(names));
}

}  // namespace

std::span<const Entry> table() {
  return kPolicies;
}

std::unique_ptr<cache::Policy> make_policy(std::string_view spec, const PolicyContext& context) {
  const Spec parsed(spec);
  const Entry& entry = find(parsed);
  parsed.check_options(entry.options);
  return entry.make(parsed, context);
}

std::string with_budget(std::string_view text, double kv_share, int32_t context) {
  Spec spec(text);
  spec.check_options(find(spec).options);
  NATSLM_CHECK(kv_share > 0 && kv_share <= 1 && context >= 1, "a budget of ", kv_share, " of ",
               context, " tokens: the share must be in (0, 1] and the context positive");
  const auto budget = static_cast<int32_t>(std::lround(kv_share * context));
  const auto need = [&](int32_t keys) {
    NATSLM_CHECK(budget >= keys, "policy ", spec.name(), ": ", budget, " keys (", kv_share, " of ",
                 context, ") are fewer than the ", keys,
                 " it needs; raise the budget or the context");
  };
  if (spec.name() == "streaming" || spec.name() == "streaming-original") {
    const int32_t sinks = spec.integer("sinks", 4, 0, kMaxPosition);
    need(sinks + 1);
    spec.set("sinks", std::to_string(sinks));
    spec.set("window", std::to_string(budget - sinks));
  } else if (spec.name() == "h2o") {
    need(2);
    spec.set("heavy", std::to_string(budget / 2));
    spec.set("recent", std::to_string(budget - budget / 2));
  } else if (spec.name() == "random") {
    const int32_t sinks = spec.integer("sinks", 4, 0, kMaxPosition);
    const int32_t window = std::max(1, budget / 8);
    need(sinks + window);
    // Of the tokens that are neither sinks nor in the last window.
    const int32_t others = std::max(1, context - sinks - window);
    const double keep = std::min(1.0, double(budget - sinks - window) / others);
    spec.set("keep", shortest(std::round(keep * 1e6) / 1e6));
    spec.set("sinks", std::to_string(sinks));
    spec.set("window", std::to_string(window));
  } else {
    fail("policy ", spec.name(),
         " has no key budget; streaming, streaming-original, h2o and random "
         "have one");
  }
  return spec.text();
}

}  // namespace natslm::policies
