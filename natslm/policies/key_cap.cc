// Why the cap holds. Let g(x) = min(spare, floor(scale * x)), C(m) the sum of the first m layers'
// wishes above their floors (each >= 0), and reserve(m) = floor(m) + g(C(m + 1)) - g(C(m)). g never
// descends, so reserve(m) >= floor(m); the differences telescope, so all reserves together are at
// most the floors plus `spare`, which is `total`. With R(l) the reserves of the layers after l:
//   used before l + R(l - 1) <= total   holds for l = 0, and if it holds for l then
//   room(l) = total - used before l - R(l) >= R(l - 1) - R(l) = reserve(l) >= floor(l), and
//   used(l) <= room(l) is the same line for l + 1.
// After the last layer R = 0: what is used is at most `total`. Rounding does no harm, because every
// number here is computed from (layer, t) alone, by the same operations each time.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/key_cap.h"

#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"

namespace natslm::policies {

int64_t keys_in(double mebibytes, const cache::Shape& shape) {
  const int64_t bytes_of_key = shape.key_bytes();
  const double keys = std::floor(mebibytes * 1048576 / static_cast<double>(bytes_of_key));
  NATSLM_CHECK(keys >= 1 && keys <= kMaxPosition, "a cache of ", mebibytes, " MiB holds ", keys,
               " keys of ", bytes_of_key, " bytes each; give room for 1 to ", kMaxPosition);
  return static_cast<int64_t>(keys);
}

KeyCap::KeyCap(const KeyBudget& budget, const cache::Shape& shape, const roles::Options& roles,
               std::span<const float> layer_shares)
    : budget_(budget),
      layers_(shape.layers),
      heads_(shape.kv_heads),
      window_(roles.window),
      chunk_(roles.chunk),
      windows_(shape.windows) {
  NATSLM_CHECK(budget.share >= 0 && budget.share <= 1 && budget.keys >= 0,
               "a key budget of the share ", budget.share, " or of ", budget.keys,
               " keys is not possible: the share must be 0 to 1, the number 0 or more");
  NATSLM_CHECK(budget.share == 0 || budget.keys == 0, "a key budget is a share (", budget.share,
               ") or a number of keys (", budget.keys, "): give one of them");
  windows_.resize(layers_, 0);
  shares_.assign(layer_shares.begin(), layer_shares.end());
  if (shares_.empty()) shares_.assign(layers_, 1);
  NATSLM_CHECK(std::ssize(shares_) == layers_, "a key budget: ", shares_.size(),
               " layer shares do not fit ", layers_, " layers");
  double sum = 0;
  for (const double share : shares_) sum += share;
  NATSLM_CHECK(sum > 0 && std::isfinite(sum) && std::ranges::min(shares_) >= 0,
               "a key budget: the layers' shares must be 0 or more and not all 0");
  for (double& share : shares_) share /= sum;
}

int64_t KeyCap::total(int32_t t) const {
  int64_t floors = 0;
  for (int32_t layer = 0; layer < layers_; ++layer) floors += floor(layer, t);
  const auto keys = static_cast<double>((int64_t{t} + 1) * layers_ * heads_);
  return std::max({floors, budget_.keys, static_cast<int64_t>(std::floor(budget_.share * keys))});
}

int64_t KeyCap::floor(int32_t layer, int32_t t) const {
  // The first token whose role chunk ended at most window_ queries ago, or has not ended yet.
  const int64_t ended = std::max(int64_t{0}, int64_t{t} - window_ - chunk_ + 1);
  const int64_t sliding = (ended + chunk_ - 1) / chunk_ * chunk_;
  // The model's own window hides what is before it, token 0 too.
  const int64_t shown = int64_t{t} + 1 - most(layer, t);
  const int64_t keys = t - std::max(sliding, shown) + 1;
  return heads_ * (keys + (sliding > 0 && shown == 0 ? 1 : 0));
}

// Per head: what there is to read.
int64_t KeyCap::most(int32_t layer, int32_t t) const {
  return windows_[layer] > 0 ? std::min(int64_t{t} + 1, int64_t{windows_[layer]}) : int64_t{t} + 1;
}

int64_t KeyCap::reserved_after(int32_t layer, int32_t t) const {
  const int64_t cap = total(t);
  int64_t spare = cap, floors_after = 0;
  double wishes = 0, wishes_before = 0;  // above the floors; before: up to this layer, it included
  for (int32_t m = 0; m < layers_; ++m) {
    const int64_t least = floor(m, t);
    spare -= least;
    if (m > layer) floors_after += least;
    const auto low = static_cast<double>(least), high = static_cast<double>(heads_ * most(m, t));
    wishes += std::clamp(shares_[m] * static_cast<double>(cap), low, high) - low;
    if (m <= layer) wishes_before = wishes;
  }
  // Where some layers' floors are above their shares, the others' wishes are cut down alike.
  const double scale = std::min(1.0, static_cast<double>(spare) / std::max(wishes, 1.0));
  const auto given = [&](double up_to) {
    return std::min(spare, static_cast<int64_t>(std::floor(scale * up_to)));
  };
  return floors_after + given(wishes) - given(wishes_before);
}

}  // namespace natslm::policies
