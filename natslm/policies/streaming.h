// StreamingLLM (Xiao et al., ICLR 2024): the first `sinks` tokens for ever and the `window` most
// recent ones, the query's own included.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/cache/policy.h"
#include "natslm/policies/policies.h"

namespace natslm::policies {

class Streaming : public cache::Policy {
 public:
  // Where a query sees its keys: at their place among the keys it reads (the paper's own way), or
  // at their position in the text.
  enum class Positions { kCache, kOriginal };

  // sinks >= 0, window >= 1.
  Streaming(int32_t sinks, int32_t window, Positions positions)
      : sinks_(sinks), window_(window), positions_(positions) {}

  std::string spec() const override;
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override;
  bool edits_stored() const override { return false; }
  bool renumbers() const override { return positions_ == Positions::kCache; }
  int32_t key_position(int32_t rank, int32_t live, int32_t position) const override;

 private:
  int32_t sinks_, window_;
  Positions positions_;
};

inline constexpr OptionDoc kStreamingOptions[] = {
    {"sinks", "4", "first tokens of a sequence, kept for ever; 0 or more"},
    {"window", "252", "most recent tokens, the query's own included; 1 or more"},
};

std::unique_ptr<cache::Policy> make_streaming(const Spec& spec, const PolicyContext& context);
std::unique_ptr<cache::Policy> make_streaming_original(const Spec& spec,
                                                       const PolicyContext& context);

}  // namespace natslm::policies
