// Counts the keys that queries can read, exactly and query by query, whatever the chunks are in
// which a text was fed: the shares "KV at end" and "KV mean" of every evaluation come from here. A
// policy's lifetimes pass through unchanged. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/cache/policy.h"

namespace natslm::engine {

// Hands every call on to the policy it owns; a base for policies that only watch.
class WatchedPolicy : public cache::Policy {
 public:
  explicit WatchedPolicy(std::unique_ptr<cache::Policy> inner) : inner_(std::move(inner)) {}

  std::string spec() const override { return inner_->spec(); }
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override {
    inner_->on_append(fresh, stored);
  }
  void after_step(int32_t slot, int32_t layer, int32_t now,
                  std::span<cache::StoredKeys> stored) override {
    inner_->after_step(slot, layer, now, stored);
  }
  void on_prefill_end(const cache::Queries& recent, std::span<cache::StoredKeys> stored) override {
    inner_->on_prefill_end(recent, stored);
  }
  void select(const cache::Queries& queries, int32_t head, const cache::StoredKeys& stored,
              std::span<uint8_t> read) override {
    inner_->select(queries, head, stored, read);
  }
  int32_t key_position(int32_t rank, int32_t live, int32_t position) const override {
    return inner_->key_position(rank, live, position);
  }
  bool wants_mass() const override { return inner_->wants_mass(); }
  bool selects() const override { return inner_->selects(); }
  bool renumbers() const override { return inner_->renumbers(); }
  bool edits_stored() const override { return inner_->edits_stored(); }
  int32_t query_window() const override { return inner_->query_window(); }
  int32_t chunk_limit() const override { return inner_->chunk_limit(); }
  int64_t key_cap(int32_t query) const override { return inner_->key_cap(query); }
  int64_t demoted(int32_t slot) const override { return inner_->demoted(slot); }
  void reset(int32_t slot) override { inner_->reset(slot); }

 private:
  std::unique_ptr<cache::Policy> inner_;
};

// Means over layers and KV heads; 1 where nothing was ever evicted.
struct KeyShares {
  double at_end = 0;  // keys that the newest query can read, itself included / tokens so far
  double mean = 0;    // the same share, averaged over all queries so far
  // Highest over all queries so far of: keys it can read / its Policy::key_cap. Never above 1 if
  // the policy keeps its word; 0 for policies that give none.
  double peak_over_cap = 0;
};

class KeyAccount final : public WatchedPolicy {
 public:
  KeyAccount(std::unique_ptr<cache::Policy> inner, const cache::Shape& shape)
      : WatchedPolicy(std::move(inner)),
        layers_(shape.layers),
        heads_(shape.kv_heads),
        windows_(shape.windows) {}

  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) override;
  void reset(int32_t slot) override;

  // Of the sequence in a slot, up to its last step.
  KeyShares shares(int32_t slot) const;

 private:
  struct Slot {
    int32_t tokens = 0;
    std::vector<int64_t> readable;  // by the newest query, summed over heads; per layer
    double share_sum = 0;           // of readable / keys so far, over queries, layers and heads
    // Only with a policy that has a cap: keys that each query of the step can read, over the layers
    // so far.
    std::vector<int64_t> of_query;
    double peak_over_cap = 0;
  };
  void compare_with_cap(const cache::NewKeys& fresh, std::span<const cache::StoredKeys> stored,
                        Slot& slot);
  int32_t end_of(int32_t layer, int32_t position, int32_t last) const;
  const std::vector<double>& harmonic(int32_t tokens);

  int32_t layers_, heads_;
  std::vector<int32_t> windows_;  // of cache::Shape: keys that are past it count for nobody
  std::vector<Slot> slots_;
  std::vector<double> harmonic_{0.0};  // [n] = 1 + 1/2 + ... + 1/n
};

}  // namespace natslm::engine
