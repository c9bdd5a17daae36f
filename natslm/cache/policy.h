// Who decides how long a cached key lives. Models hand every new key to a Policy; the cache obeys
// the lifetimes it writes. Implementations live in policies/; models never see a concrete one.
//
// Only on_append must be written; every other hook does nothing by default. Hooks are called per
// layer, from the one thread that runs the model. A policy may keep state per (sequence slot,
// layer).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "natslm/base/lifetime.h"

namespace natslm::cache {

// The stored keys of one (sequence, layer, KV head), in storage order (which eviction changes).
struct StoredKeys {
  std::span<const int32_t> position;
  std::span<int32_t> last;      // a policy may shorten or, for kOpenEnded keys, set it
  std::span<float> score;       // one number per key that the policy owns and that moves with it; 0
                                // at first
  std::span<const float> mass;  // probability received in the last step, summed over its queries
                                // and the group's heads; empty unless wants_mass()
};

// The event that open-ended keys waited for came with the token at `position`, which still reads
// them.
inline void end_open(StoredKeys& keys, int32_t position) {
  for (int32_t& last : keys.last) last = last == kOpenEnded ? position : last;
}

// New keys of one sequence in one layer, before they are attended to.
struct NewKeys {
  int32_t slot = 0;  // the sequence's place in the cache
  int32_t layer = 0;
  int32_t first_position = 0;
  at::Tensor hidden;        // [n, width]: the normed input that q, k and v are made of
  at::Tensor score_weight;  // [3 * Hkv, width], the model's score layer; undefined if it has none
  at::Tensor k, v;          // [n, Hkv, D]; k as stored (rotated unless the policy renumbers)
  at::Tensor last;          // [Hkv, n] int32 on the CPU, filled with kForever: write lifetimes here
};

// Queries of one sequence in one layer, for policies that look at them.
struct Queries {
  int32_t slot = 0;
  int32_t layer = 0;
  int32_t first_position = 0;
  at::Tensor q;  // [n, Hq, D] as used for the scores
};

class Policy {
 public:
  virtual ~Policy() = default;

  // As a user writes it: "streaming:sinks=4,window=252".
  virtual std::string spec() const = 0;

  // Before new keys are stored: write fresh.last. `stored` has one entry per KV head and may be
  // changed too (a Global ends the open Locals before it).
  virtual void on_append(NewKeys& fresh, std::span<StoredKeys> stored) = 0;

  // After the queries of a step were attended, before the dead are evicted. `now` is the next
  // position; a key is gone at once if its last < now.
  virtual void after_step(int32_t slot, int32_t layer, int32_t now, std::span<StoredKeys> stored) {
    (void)slot, (void)layer, (void)now, (void)stored;
  }

  // Once, when the engine says the prompt is complete; `recent` holds the prompt's last queries
  // (up to query_window() of them).
  virtual void on_prefill_end(const Queries& recent, std::span<StoredKeys> stored) {
    (void)recent, (void)stored;
  }

  // Which stored keys a step's queries read, for methods that keep all and read few. Writes 1
  // (read) or 0 per stored key of KV head `head`; called only if selects().
  virtual void select(const Queries& queries, int32_t head, const StoredKeys& stored,
                      std::span<uint8_t> read) {
    (void)queries, (void)head, (void)stored, (void)read;
  }

  // Position that query `query_position` uses for the stored key of rank `rank` (by position, among
  // the `live` keys it can read, itself included), for methods that renumber; called only if
  // renumbers(). The query itself has rank live - 1.
  virtual int32_t key_position(int32_t rank, int32_t live, int32_t position) const {
    (void)rank, (void)live;
    return position;
  }

  virtual bool wants_mass() const { return false; }  // fills StoredKeys::mass
  virtual bool selects() const { return false; }     // calls select()
  virtual bool renumbers() const { return false; }   // keys are stored before RoPE
  // False promises that no hook writes StoredKeys::last, so that the cache need not look through it
  // after each hook.
  virtual bool edits_stored() const { return true; }
  virtual int32_t query_window() const { return 0; }  // queries kept for on_prefill_end
  // Largest number of tokens a step may append (0: no limit): part of the definition of methods
  // that decide per step.
  virtual int32_t chunk_limit() const { return 0; }
  // Most keys that a query at this position may read, over all layers and KV heads, if the policy
  // guarantees such a number; 0: none.
  virtual int64_t key_cap(int32_t query) const {
    (void)query;
    return 0;
  }
  // Keys of a slot's sequence that would have lived on but for that guarantee, so far.
  virtual int64_t demoted(int32_t slot) const {
    (void)slot;
    return 0;
  }
  // A sequence slot was emptied: forget what is known of it.
  virtual void reset(int32_t slot) { (void)slot; }
};

}  // namespace natslm::cache
