// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/key_ledger.h"

#include <algorithm>
#include <tuple>

#include "natslm/base/error.h"

namespace natslm::policies {
namespace {

// For a heap with the least certain on top. A total order: what is taken out does not depend on
// when keys were put in.
bool later(const KeyLedger::Key& a, const KeyLedger::Key& b) {
  const auto order = [](const KeyLedger::Key& key) {
    return std::tuple(key.certainty, key.position, int32_t{key.head});
  };
  return order(a) > order(b);
}

}  // namespace

KeyLedger::KeyLedger(int32_t heads, const roles::Options& roles, int32_t model_window)
    : heads_(heads),
      window_(roles.window),
      chunk_(roles.chunk),
      model_window_(model_window),
      closed_(heads, 0),
      closing_(heads, 0) {}

bool KeyLedger::shown(int32_t position) const {
  return model_window_ == 0 || int64_t{position} + model_window_ > now_;
}

bool KeyLedger::leaving(int32_t position) const {
  return model_window_ > 0 && int64_t{position} + model_window_ == int64_t{now_} + 1;
}

bool KeyLedger::gone(const Key& key) const {
  return !shown(key.position) || (key.open && key.position < closed_[key.head]);
}

void KeyLedger::depart(int64_t keys) {
  readable_ -= keys;
  departed_ += keys;
}

void KeyLedger::arrive(int32_t t) {
  now_ = t;
  closed_ = closing_;
  depart(ending_);
  ending_ = 0;
  while (!sliding_.empty() && sliding_.front().query <= t) {
    depart(sliding_.front().keys);
    sliding_.pop_front();
  }
  while (!windowed_.empty() && !shown(windowed_first_)) {
    depart(windowed_.front());
    windowed_.pop_front();
    ++windowed_first_;
  }
  readable_ += heads_;
  if (model_window_ > 0) windowed_.push_back(heads_);
  while (!young_.empty() && int64_t{young_.front().position} + chunk_ - 1 + window_ < t) {
    mature(young_.front());
    young_.pop_front();
  }
  if (departed_ > std::ssize(candidates_) / 2 + 64) compact();
}

void KeyLedger::mature(const Key& chunk) {
  for (Key key = chunk; key.position < chunk.position + chunk_; ++key.position) {
    if (key.position == 0 || gone(key)) continue;
    candidates_.push_back(key);
    std::ranges::push_heap(candidates_, later);
  }
}

void KeyLedger::compact() {
  std::erase_if(candidates_, [&](const Key& key) { return gone(key); });
  if (candidates_.capacity() > 4 * candidates_.size() + 64) candidates_.shrink_to_fit();
  std::ranges::make_heap(candidates_, later);
  departed_ = 0;
}

void KeyLedger::keep(int32_t head, int32_t first, float certainty, bool open) {
  young_.push_back({certainty, first, head, open});
  if (!open) closing_[head] = first;
}

void KeyLedger::slide(int32_t first) {
  // Those that the model's window does not hide before.
  const int64_t end = int64_t{now_} + window_ + 1;
  const int64_t from =
      model_window_ > 0 ? std::max(int64_t{first}, end - model_window_ + 1) : int64_t{first};
  if (from > now_) return;
  if (model_window_ > 0) {
    for (auto position = static_cast<int32_t>(from); position <= now_; ++position)
      --windowed(position);
  }
  if (sliding_.empty() || sliding_.back().query != end) sliding_.push_back({end, 0});
  sliding_.back().keys += now_ - from + 1;
}

void KeyLedger::end_open(int32_t position) {
  if (!shown(position) || leaving(position)) return;
  if (model_window_ > 0) --windowed(position);
  ++ending_;
}

std::optional<KeyLedger::Key> KeyLedger::demote() {
  while (!candidates_.empty()) {
    std::ranges::pop_heap(candidates_, later);
    const Key key = candidates_.back();
    candidates_.pop_back();
    if (gone(key)) continue;
    --readable_;
    const bool ending = key.open && key.position < closing_[key.head];
    if (ending && !leaving(key.position)) {
      --ending_;
    } else if (model_window_ > 0) {
      --windowed(key.position);
    }
    return key;
  }
  return std::nullopt;
}

}  // namespace natslm::policies
