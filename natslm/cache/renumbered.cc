// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/renumbered.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "natslm/ops/decode.h"

namespace natslm::cache {
namespace {

using kernels::CachedKeys;
using kernels::kPageKeys;

// Queries handled at once, which bounds the copies of the keys.
constexpr int32_t kQueriesAtOnce = 64;

// The queries of one sequence with the keys of one KV head. Each query becomes a sequence of its
// own for the kernel, with its own copy of the keys it reads, rotated to where that query sees
// them.
template <class Element>
class RenumberedHead {
 public:
  RenumberedHead(const Policy& policy, const Rotate& rotate, const CachedKeys& keys,
                 int32_t head_dim, at::ScalarType dtype)
      : policy_(policy), rotate_(rotate), keys_(keys), d_(head_dim), dtype_(dtype) {
    order_.resize(keys.count);
    std::iota(order_.begin(), order_.end(), 0);
    std::ranges::sort(order_, {}, [&](int32_t j) { return keys_.position[j]; });
    if (keys.mass) std::fill_n(keys.mass, keys.count, 0.0f);
  }

  // q, out [n, group, D], n <= kQueriesAtOnce.
  at::Tensor attend(const at::Tensor& q, std::span<const int32_t> positions, double scale) {
    choose(positions);
    const at::Tensor rotated_q = rotate(q, query_position_);
    const at::Tensor k = rotate(gathered_keys(), key_position_);
    pack(static_cast<const Element*>(k.const_data_ptr()));
    const int32_t n = static_cast<int32_t>(positions.size());
    std::vector<int32_t> row_start(n + 1), zeros(std::max<size_t>(read_.size(), n), 0);
    std::iota(row_start.begin(), row_start.end(), 0);
    std::vector<float> mass(keys_.mass ? read_.size() : 0);
    std::vector<CachedKeys> lists(n);
    for (int32_t i = 0, page = 0; i < n; ++i) {
      CachedKeys& list = lists[i];
      list.count = begin_[i + 1] - begin_[i];
      list.pages = pages_.data() + page;
      page += (list.count + kPageKeys - 1) / kPageKeys;
      list.position = list.last = zeros.data();  // all are visible to a query at 0
      if (keys_.mass) list.mass = mass.data() + begin_[i];
    }
    at::Tensor out =
        ops::attend_pages(rotated_q, row_start, std::span(zeros).first(n), lists, 1, scale);
    for (size_t m = 0; m < mass.size(); ++m) keys_.mass[read_[m]] += mass[m];
    return out;
  }

 private:
  // Which keys each query reads, by position, and at which positions it sees them and itself.
  void choose(std::span<const int32_t> positions) {
    read_.clear(), key_position_.clear(), query_position_.clear();
    begin_.assign(1, 0);
    for (const int32_t i : positions) {
      for (const int32_t j : order_) {
        if (visible(i, keys_.position[j], keys_.last[j])) read_.push_back(j);
      }
      const int32_t begin = begin_.back(), live = static_cast<int32_t>(read_.size()) - begin;
      for (int32_t rank = 0; rank < live; ++rank) {
        const int32_t position = keys_.position[read_[begin + rank]];
        key_position_.push_back(policy_.key_position(rank, live, position));
      }
      query_position_.push_back(policy_.key_position(std::max(live - 1, 0), live, i));
      begin_.push_back(begin + live);
    }
  }

  at::Tensor rotate(const at::Tensor& x, std::vector<int32_t>& positions) const {
    if (!rotate_ || positions.empty()) return x.contiguous();
    const at::Tensor at = at::from_blob(positions.data(), {std::ssize(positions)}, at::kInt);
    return rotate_(x, at).to(dtype_).contiguous();
  }

  at::Tensor gathered_keys() const {
    at::Tensor k = at::empty({std::ssize(read_), 1, d_}, dtype_);
    auto* to = static_cast<Element*>(k.mutable_data_ptr());
    for (size_t m = 0; m < read_.size(); ++m) {
      const int32_t j = read_[m];
      const auto* from = static_cast<const Element*>(keys_.pages[j / kPageKeys]) + j % kPageKeys;
      for (int32_t c = 0; c < d_; ++c) to[m * d_ + c] = from[c * kPageKeys];
    }
    return k;
  }

  void pack(const Element* k) {
    const int64_t page_elements = int64_t{2} * kPageKeys * d_;
    int64_t pages = 0;
    for (size_t i = 0; i + 1 < begin_.size(); ++i) {
      pages += (begin_[i + 1] - begin_[i] + kPageKeys - 1) / kPageKeys;
    }
    packed_ = at::empty({pages * page_elements}, dtype_);
    auto* next = static_cast<Element*>(packed_.mutable_data_ptr());
    pages_.clear();
    for (size_t i = 0; i + 1 < begin_.size(); ++i) {
      for (int32_t m = begin_[i]; m < begin_[i + 1];) {
        const int32_t n = std::min(kPageKeys, begin_[i + 1] - m);
        Element* values = next + int64_t{kPageKeys} * d_;
        for (int32_t c = 0; c < d_; ++c) {
          for (int32_t s = 0; s < n; ++s) next[c * kPageKeys + s] = k[int64_t{m + s} * d_ + c];
        }
        for (int32_t s = 0; s < n; ++s) {
          const int32_t j = read_[m + s];
          const auto* page = static_cast<const Element*>(keys_.pages[j / kPageKeys]);
          std::copy_n(page + (kPageKeys + j % kPageKeys) * int64_t{d_}, d_,
                      values + int64_t{s} * d_);
        }
        pages_.push_back(next);
        next += page_elements;
        m += n;
      }
    }
  }

  const Policy& policy_;
  const Rotate& rotate_;
  const CachedKeys& keys_;
  int32_t d_;
  at::ScalarType dtype_;
  std::vector<int32_t> order_;         // stored keys by position
  std::vector<int32_t> read_, begin_;  // query m reads read_[begin_[m] .. begin_[m + 1])
  std::vector<int32_t> key_position_, query_position_;
  at::Tensor packed_;
  std::vector<const void*> pages_;
};

template <class Element>
void attend_head(const Policy& policy, const Rotate& rotate, const at::Tensor& q, at::Tensor out,
                 std::span<const int32_t> positions, const CachedKeys& keys, double scale) {
  RenumberedHead<Element> head(policy, rotate, keys, static_cast<int32_t>(q.size(2)),
                               q.scalar_type());
  const int64_t rows = q.size(0);
  for (int64_t row = 0; row < rows; row += kQueriesAtOnce) {
    const int64_t n = std::min<int64_t>(kQueriesAtOnce, rows - row);
    out.narrow(0, row, n).copy_(head.attend(q.narrow(0, row, n), positions.subspan(row, n), scale));
  }
}

}  // namespace

at::Tensor attend_renumbered(const Policy& policy, const Rotate& rotate, const at::Tensor& q,
                             std::span<const int32_t> row_start,
                             std::span<const int32_t> row_position,
                             std::span<const CachedKeys> keys, int32_t kv_heads, double scale) {
  at::Tensor out = at::empty(q.sizes(), q.options());
  const int64_t group = q.size(1) / kv_heads;
  for (size_t b = 0; b + 1 < row_start.size(); ++b) {
    const int32_t row = row_start[b], n = row_start[b + 1] - row;
    if (n == 0) continue;
    for (int32_t h = 0; h < kv_heads; ++h) {
      const auto part = [&](const at::Tensor& x) {
        return x.narrow(0, row, n).narrow(1, h * group, group);
      };
      const auto attend =
          q.scalar_type() == at::kFloat ? attend_head<float> : attend_head<uint16_t>;
      attend(policy, rotate, part(q), part(out), row_position.subspan(row, n),
             keys[b * kv_heads + h], scale);
    }
  }
  return out;
}

}  // namespace natslm::cache
