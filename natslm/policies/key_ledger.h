// The keys of one (sequence, layer) that the newest query can read: counted, key by key, as tokens
// arrive and roles are decided, and the order in which they would be given up. It knows positions
// and lifetimes' ends, not the stored keys; who holds those acts on what demote() says.
//
// Memory: of the keys in the windows and of the live ones older than that, no more.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <iterator>
#include <optional>
#include <vector>

#include "natslm/roles/roles.h"

namespace natslm::policies {

class KeyLedger {
 public:
  // `model_window` as in cache::Shape.
  KeyLedger(int32_t heads, const roles::Options& roles, int32_t model_window);

  struct Key {
    float certainty = 0;
    int32_t position = 0;
    int32_t head : 31 = 0;
    bool open : 1 = false;  // a Local: the head's next Global ends it
  };

  // For each token t, in order: arrive(t); if t completes a role chunk, keep() or slide() for each
  // head; then demote() as often as needed.
  //
  // Every head has a new key, readable for ever as far as is known; what query t no longer reads is
  // off the count.
  void arrive(int32_t t);

  // The chunk that begins with token `first` and ends with t lives on, for ever or `open`.
  void keep(int32_t head, int32_t first, float certainty, bool open);
  // It is read by the next `window` queries and t's own.
  void slide(int32_t first);
  // A Global ends the open key at `position`, which query t still reads: called for each of them,
  // before keep() for the Global.
  void end_open(int32_t position);

  // Over all heads, by query t.
  int64_t readable() const { return readable_; }

  // Takes the least certain key that lives on and is older than its window off the count: query t
  // does not read it. Ties go to the older position, then the lower head. Token 0 is never taken.
  std::optional<Key> demote();

  // Things remembered: at most a small multiple of the live and the window's keys.
  int64_t entries() const {
    return std::ssize(sliding_) + std::ssize(windowed_) + std::ssize(young_) +
           std::ssize(candidates_);
  }

 private:
  struct Departure {
    int64_t query;  // the first that does not read them
    int64_t keys;
  };
  bool shown(int32_t position) const;    // by the model's own window
  bool leaving(int32_t position) const;  // query t is the last that this window lets read it
  bool gone(const Key& key) const;
  int32_t& windowed(int32_t position) { return windowed_[position - windowed_first_]; }
  void depart(int64_t keys);
  void mature(const Key& chunk);
  void compact();

  int32_t heads_, window_, chunk_, model_window_;
  int32_t now_ = -1;
  int64_t readable_ = 0;
  std::deque<Departure> sliding_;  // by query
  // Keys that end with the model's window, by position; only with such a window.
  std::deque<int32_t> windowed_;
  int32_t windowed_first_ = 0;
  int64_t ending_ = 0;  // Locals whose last query is t
  // Open keys before closed_[head] are gone; those before closing_[head] are, after query t.
  std::vector<int32_t> closed_, closing_;
  std::deque<Key> young_;        // first tokens of chunks that live on, still inside their window
  std::vector<Key> candidates_;  // a heap, the least certain on top; some are gone already
  int64_t departed_ = 0;         // keys that left since the heap was last cleared of those
};

}  // namespace natslm::policies
