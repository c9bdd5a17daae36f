// SPDX-License-Identifier: Apache-2.0
#include "natslm/engine/key_account.h"

#include <algorithm>

#include "natslm/base/error.h"

namespace natslm::engine {

const std::vector<double>& KeyAccount::harmonic(int32_t tokens) {
  while (static_cast<int32_t>(harmonic_.size()) <= tokens) {
    harmonic_.push_back(harmonic_.back() + 1.0 / static_cast<double>(harmonic_.size()));
  }
  return harmonic_;
}

void KeyAccount::on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) {
  WatchedPolicy::on_append(fresh, stored);
  // From here on it is settled what each query of the step can read: the stored keys and the new
  // ones, each up to its `last`. What the policy decides after the step concerns later queries.
  if (static_cast<int32_t>(slots_.size()) <= fresh.slot) slots_.resize(fresh.slot + 1);
  Slot& slot = slots_[fresh.slot];
  if (slot.readable.empty()) slot.readable.assign(layers_, 0);

  const int32_t count = static_cast<int32_t>(fresh.last.size(1));
  const int32_t begin = fresh.first_position;
  const int32_t newest = begin + count - 1;
  const std::vector<double>& sum = harmonic(newest + 1);
  // Query i has i + 1 keys so far, so a key readable by queries a .. b adds 1/(a + 1) + ... + 1/(b
  // + 1).
  const auto share = [&](int32_t a, int32_t b) { return b < a ? 0.0 : sum[b + 1] - sum[a]; };

  const int32_t* last = fresh.last.const_data_ptr<int32_t>();
  int64_t readable = 0;
  double shares = 0;
  for (int32_t head = 0; head < heads_; ++head) {
    int64_t survivors = 0;
    for (size_t j = 0; j < stored[head].last.size(); ++j) {
      const int32_t end = end_of(fresh.layer, stored[head].position[j], stored[head].last[j]);
      if (end >= newest) {
        ++survivors;
      } else {
        shares += share(begin, end);
      }
    }
    shares += static_cast<double>(survivors) * share(begin, newest);
    readable += survivors;
    for (int32_t row = 0; row < count; ++row) {
      const int32_t end = end_of(fresh.layer, begin + row, last[head * count + row]);
      readable += end >= newest;
      shares += share(begin + row, std::min(end, newest));
    }
  }
  slot.readable[fresh.layer] = readable;
  slot.share_sum += shares;
  slot.tokens = newest + 1;
  if (key_cap(newest) > 0) compare_with_cap(fresh, stored, slot);
}

// The last query that can read a key, the model's own window considered.
int32_t KeyAccount::end_of(int32_t layer, int32_t position, int32_t last) const {
  const int32_t window = windows_.empty() ? 0 : windows_[layer];
  return window > 0 ? static_cast<int32_t>(std::min<int64_t>(last, int64_t{position} + window - 1))
                    : last;
}

void KeyAccount::compare_with_cap(const cache::NewKeys& fresh,
                                  std::span<const cache::StoredKeys> stored, Slot& slot) {
  const int32_t count = static_cast<int32_t>(fresh.last.size(1)), begin = fresh.first_position;
  // By how much the number of readable keys changes from each query to the next.
  std::vector<int64_t> change(size_t(count) + 1);
  const auto add = [&](int32_t first, int32_t end) {
    if (end < first) return;
    ++change[first - begin];
    --change[std::min(end - begin, count - 1) + 1];
  };
  const int32_t* last = fresh.last.const_data_ptr<int32_t>();
  for (int32_t head = 0; head < heads_; ++head) {
    const cache::StoredKeys& keys = stored[head];
    for (size_t j = 0; j < keys.last.size(); ++j) {
      add(begin, end_of(fresh.layer, keys.position[j], keys.last[j]));
    }
    for (int32_t row = 0; row < count; ++row) {
      add(begin + row, end_of(fresh.layer, begin + row, last[head * count + row]));
    }
  }
  if (fresh.layer == 0) slot.of_query.assign(count, 0);
  int64_t readable = 0;
  for (int32_t row = 0; row < count; ++row) {
    readable += change[row];
    slot.of_query[row] += readable;
  }
  if (fresh.layer + 1 < layers_) return;
  for (int32_t row = 0; row < count; ++row) {
    slot.peak_over_cap =
        std::max(slot.peak_over_cap, static_cast<double>(slot.of_query[row]) /
                                         static_cast<double>(key_cap(begin + row)));
  }
}

void KeyAccount::reset(int32_t slot) {
  WatchedPolicy::reset(slot);
  if (slot < static_cast<int32_t>(slots_.size())) slots_[slot] = Slot{};
}

KeyShares KeyAccount::shares(int32_t slot) const {
  if (slot >= static_cast<int32_t>(slots_.size()) || slots_[slot].tokens == 0) return {};
  const Slot& s = slots_[slot];
  int64_t readable = 0;
  for (const int64_t of_layer : s.readable) readable += of_layer;
  const double pairs = static_cast<double>(s.tokens) * layers_ * heads_;
  return {static_cast<double>(readable) / pairs, s.share_sum / pairs, s.peak_over_cap};
}

}  // namespace natslm::engine
