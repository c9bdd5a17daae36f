// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/cpu/live_keys.h"

#include <algorithm>

#include "natslm/base/lifetime.h"

namespace natslm::kernels::cpu {

LiveKeys::LiveKeys(const int32_t* last, int32_t length) : last_(last) {
  for (int32_t begin = 0; begin < length; begin += kStretch) {
    longest_.push_back(*std::max_element(last + begin, last + std::min(begin + kStretch, length)));
  }
}

int32_t LiveKeys::find(int32_t q0, int32_t q1, int32_t* keys, int32_t* full) const {
  // Full ones grow from the front, the others from the back: without a branch in the loop.
  int32_t front = 0, back = q1;
  for (int32_t begin = 0; begin <= q0; begin += kStretch) {
    if (dead(q0, longest_[begin / kStretch])) continue;
    const int32_t end = std::min(begin + kStretch - 1, q0);
    for (int32_t j = begin; j <= end; ++j) {
      const bool all = last_[j] >= q1, some = last_[j] >= q0;
      keys[front] = j;
      front += all;
      keys[back] = j;
      back -= some && !all;
    }
  }
  for (int32_t j = q0 + 1; j <= q1; ++j) {
    keys[back] = j;
    back -= last_[j] >= j;
  }
  *full = front;
  std::reverse(keys + back + 1, keys + q1 + 1);
  const int32_t partial = q1 - back;
  std::copy(keys + back + 1, keys + q1 + 1, keys + front);
  return front + partial;
}

std::vector<int64_t> LiveKeys::count(int32_t tile, int32_t length) const {
  const int32_t tiles = (length + tile - 1) / tile;
  std::vector<int64_t> change(tiles + 1, 0);
  for (int32_t j = 0; j < length; ++j) {
    if (last_[j] < j) continue;
    ++change[j / tile];
    --change[std::min(last_[j], length - 1) / tile + 1];
  }
  for (int32_t i = 1; i < tiles; ++i) change[i] += change[i - 1];
  change.pop_back();
  return change;
}

}  // namespace natslm::kernels::cpu
