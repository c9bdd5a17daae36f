// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/demotion.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "natslm/base/error.h"

namespace natslm::policies {
namespace {

// Index of a value that is there. In blocks, because a compiler makes vector code of a loop that
// does not leave early: 16 times as fast in a list of thousands, and every key that is given up is
// looked for.
size_t index_of(std::span<const int32_t> values, int32_t value) {
  constexpr size_t kBlock = 64;
  size_t begin = 0;
  for (; begin + kBlock <= values.size(); begin += kBlock) {
    bool here = false;
    for (size_t i = 0; i < kBlock; ++i) here |= values[begin + i] == value;
    if (here) break;
  }
  while (begin < values.size() && values[begin] != value) ++begin;
  NATSLM_ASSERT(begin < values.size());
  return begin;
}

}  // namespace

float certainty(const float* logits, roles::Role role, roles::RoleSet set, float bias) {
  const float sure = roles::allows(set, roles::kSliding)
                         ? logits[role] - (logits[roles::kSliding] + bias)
                         : logits[roles::kGlobal] - logits[roles::kLocal];
  return std::isnan(sure) ? std::numeric_limits<float>::infinity() : sure;
}

Demotion::Demotion(KeyCap cap, const cache::Shape& shape, const roles::Options& roles)
    : cap_(std::move(cap)), heads_(shape.kv_heads), roles_(roles), windows_(shape.windows) {
  windows_.resize(shape.layers, 0);
}

void Demotion::begin(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) {
  NATSLM_CHECK(fresh.layer < std::ssize(windows_) && std::ssize(stored) == heads_,
               "policy learned: its budget was made for ", windows_.size(), " layers of ", heads_,
               " KV heads; the cache has a layer ", fresh.layer, " and ", stored.size(), " heads");
  if (std::ssize(slots_) <= fresh.slot) slots_.resize(fresh.slot + 1);
  slot_ = &slots_[fresh.slot];
  layer_ = fresh.layer;
  first_ = fresh.first_position;
  count_ = static_cast<int32_t>(fresh.last.size(1));
  fresh_ = fresh.last.mutable_data_ptr<int32_t>();
  stored_ = stored;
  if (layer_ == 0) {
    slot_->left.clear();
    for (int32_t i = 0; i < count_; ++i) slot_->left.push_back(cap_.total(first_ + i));
  }
  while (std::ssize(slot_->layers) <= layer_) {
    slot_->layers.emplace_back(heads_, roles_, windows_[slot_->layers.size()]);
  }
  ledger_ = &slot_->layers[layer_];
}

void Demotion::arrive(int32_t token) {
  now_ = token;
  ledger_->arrive(token);
  if (token > first_) return;
  // The ledger against the cache: a step begins with the keys that its first query can read.
  int64_t keys = heads_;
  for (const cache::StoredKeys& of_head : stored_) keys += std::ssize(of_head.position);
  NATSLM_ASSERT(ledger_->readable() == keys);
}

void Demotion::decided(int32_t head, roles::Role role, float certainty, int32_t first) {
  if (role == roles::kSliding) {
    ledger_->slide(first);
    return;
  }
  if (role == roles::kGlobal) {
    const cache::StoredKeys& keys = stored_[head];
    for (size_t j = 0; j < keys.last.size(); ++j) {
      if (keys.last[j] == kOpenEnded) ledger_->end_open(keys.position[j]);
    }
    for (int32_t j = first_; j < first; ++j) {
      if (fresh_[int64_t{head} * count_ + j - first_] == kOpenEnded) ledger_->end_open(j);
    }
  }
  ledger_->keep(head, first, certainty, role == roles::kLocal);
}

int32_t* Demotion::find(const KeyLedger::Key& key) const {
  if (key.position >= first_) return fresh_ + int64_t{key.head} * count_ + key.position - first_;
  const cache::StoredKeys& keys = stored_[key.head];
  return &keys.last[index_of(keys.position, key.position)];
}

void Demotion::settle() {
  int64_t& left = slot_->left[now_ - first_];
  if (ledger_->readable() > cap_.floor(layer_, now_)) {
    const int64_t room = left - cap_.reserved_after(layer_, now_);
    while (ledger_->readable() > room) {
      const std::optional<KeyLedger::Key> key = ledger_->demote();
      NATSLM_ASSERT(key.has_value());  // room is never below the floor
      if (!key) break;
      *find(*key) = now_ - 1;
      ++slot_->demoted;
    }
  }
  left -= ledger_->readable();
}

int64_t Demotion::demoted(int32_t slot) const {
  return slot < std::ssize(slots_) ? slots_[slot].demoted : 0;
}

void Demotion::reset(int32_t slot) {
  if (slot < std::ssize(slots_)) slots_[slot] = Slot();
}

}  // namespace natslm::policies
