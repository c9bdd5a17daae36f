// How many keys a query may read when a budget is guaranteed, over all layers and KV heads and in
// each layer. Pure arithmetic: functions of the query's position alone, so that they are the same
// however a text is cut into steps.
//
// A layer's floor is what no demotion can take from it: the query's own key, those that a Sliding
// role would keep, and token 0. What the cap has above all floors is shared out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "natslm/cache/kv_cache.h"
#include "natslm/roles/roles.h"

namespace natslm::policies {

struct KeyBudget {
  double share = 0;  // of the keys so far of all layers and KV heads, in [0, 1]; 0: none
  int64_t keys = 0;  // a number of them, whatever the length; 0: none. Not both
};

// The keys whose keys and values fit so many MiB, over all layers and heads, as a cache of this
// shape stores them. Throws Error if that is not one.
int64_t keys_in(double mebibytes, const cache::Shape& shape);

class KeyCap {
 public:
  // `layer_shares`: what each layer holds of all live keys, as measured; empty: equal. Throws Error
  // for a budget out of range and for shares that do not fit the layers.
  KeyCap(const KeyBudget& budget, const cache::Shape& shape, const roles::Options& roles,
         std::span<const float> layer_shares = {});

  // Keys that query t may read, over all layers and heads: the budget, or the floors if those are
  // more.
  int64_t total(int32_t t) const;
  // A layer's floor, over its heads.
  int64_t floor(int32_t layer, int32_t t) const;
  // What is set aside at query t for the layers after this one, which in a chunk see t only later.
  // For any `used` with used(l) <= room(l) = total - used(0) - ... - used(l - 1) -
  // reserved_after(l):
  //   room(l) >= floor(l)            so that a layer can always keep to its room, and
  //   used(0) + ... + used(L - 1) <= total.
  // key_cap.cc has the proof.
  int64_t reserved_after(int32_t layer, int32_t t) const;

 private:
  int64_t most(int32_t layer, int32_t t) const;

  KeyBudget budget_;
  int32_t layers_, heads_, window_, chunk_;
  std::vector<int32_t> windows_;  // the model's own, by layer; 0: none
  std::vector<double> shares_;    // by layer; their sum is 1
};

}  // namespace natslm::policies
