// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/renumbered.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/logaddexp.h>

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

// Which keys a query reads and where it sees them.
struct Reads {
  std::vector<int32_t> key;       // stored keys, query after query
  std::vector<int32_t> position;  // where the query sees each
  std::vector<int32_t> begin{0};  // query m: [begin[m], begin[m + 1])
  void clear() { *this = Reads(); }
};

// The queries of one sequence with the keys of one KV head.
//
// Only differences of positions count. So a key that a query sees at its distance in the text needs
// no new place: such keys are rotated once for all queries, each as far from the oldest as it is in
// the text ("in place"; counted from the oldest, because a table of angles ends with the model's
// context). The others ("moved", for StreamingLLM the sinks) are copied for each query that sees
// them elsewhere, and every query becomes a sequence of its own for the kernel. The two parts are
// merged by their log-sum-exp.
template <class Element>
class RenumberedHead {
 public:
  RenumberedHead(const Policy& policy, const Rotate& rotate, int32_t rotary_positions,
                 const CachedKeys& keys, int32_t head_dim, at::ScalarType dtype)
      : policy_(policy),
        rotate_(rotate),
        rotary_positions_(rotary_positions),
        keys_(keys),
        d_(head_dim),
        dtype_(dtype) {
    order_.resize(keys.count);
    std::iota(order_.begin(), order_.end(), 0);
    std::ranges::sort(order_, {}, [&](int32_t j) { return keys_.position[j]; });
    if (keys.mass) std::fill_n(keys.mass, keys.count, 0.0f);
  }

  // How many of these queries the next attend() may take.
  int64_t choose(std::span<const int32_t> positions) {
    // The mass of a part cannot be rescaled once it is summed over queries.
    if (keys_.mass || !sort_reads(positions, true)) sort_reads(positions, false);
    const auto n = std::ssize(positions);
    if (in_place_.empty()) return n;
    const int32_t furthest =
        std::max(rotary_positions_ - 1, *std::ranges::max_element(query_position_));
    const int64_t excess = positions.back() - keys_.position[in_place_[0]] - furthest;
    if (excess <= 0) return n;
    const int64_t fewer = std::max<int64_t>(1, n - excess);
    sort_reads(positions.first(fewer), true);
    return fewer;
  }

  // q [n, group, D] at the positions last chosen; returns the same shape.
  at::Tensor attend(const at::Tensor& q, std::span<const int32_t> positions, double scale) {
    if (in_place_.empty()) return attend_moved(q, scale, nullptr);
    if (moved_.key.empty()) return attend_in_place(q, positions, scale, nullptr);
    at::Tensor lse_a, lse_b;
    const at::Tensor a = attend_in_place(q, positions, scale, &lse_a);
    const at::Tensor b = attend_moved(q, scale, &lse_b);
    const at::Tensor lse = at::logaddexp(lse_a, lse_b);
    const auto weighted = [&](const at::Tensor& x, const at::Tensor& part) {
      return x.to(at::kFloat) * (part - lse).exp().nan_to_num(0).unsqueeze(2);
    };
    return (weighted(a, lse_a) + weighted(b, lse_b)).to(dtype_);
  }

 private:
  // Sorts what the queries read into the two parts. False if some key is in place again for a query
  // after one that saw it elsewhere, which a lifetime cannot say; without `in_place` all are moved.
  bool sort_reads(std::span<const int32_t> positions, bool in_place) {
    moved_.clear();
    in_place_.clear();
    in_place_last_.assign(keys_.count, -1);
    query_position_.clear();
    std::vector<bool> has_moved(keys_.count, false);
    std::vector<int32_t> read;
    for (const int32_t i : positions) {
      read.clear();
      for (const int32_t j : order_) {
        if (visible(i, keys_.position[j], keys_.last[j])) read.push_back(j);
      }
      const auto live = static_cast<int32_t>(read.size());
      const int32_t query = policy_.key_position(std::max(live - 1, 0), live, i);
      for (int32_t rank = 0; rank < live; ++rank) {
        const int32_t j = read[rank], from = keys_.position[j];
        const int32_t to = policy_.key_position(rank, live, from);
        if (in_place && int64_t{query} - to == int64_t{i} - from) {
          if (has_moved[j]) return false;
          in_place_last_[j] = i;
        } else {
          has_moved[j] = true;
          moved_.key.push_back(j);
          moved_.position.push_back(to);
        }
      }
      moved_.begin.push_back(static_cast<int32_t>(moved_.key.size()));
      query_position_.push_back(query);
    }
    for (const int32_t j : order_) {
      if (in_place_last_[j] >= 0) in_place_.push_back(j);
    }
    return true;
  }

  at::Tensor attend_in_place(const at::Tensor& q, std::span<const int32_t> positions, double scale,
                             at::Tensor* lse) {
    const int32_t oldest = keys_.position[in_place_[0]];
    std::vector<int32_t> position, last, query;
    for (const int32_t j : in_place_) {
      position.push_back(keys_.position[j] - oldest);
      last.push_back(in_place_last_[j] - oldest);
    }
    for (const int32_t i : positions) query.push_back(i - oldest);
    const auto count = static_cast<int32_t>(in_place_.size());
    const at::Tensor k = rotate(gather(in_place_), position);
    pack(in_place_, {0, count}, k);
    const CachedKeys list{pages_.data(), position.data(), last.data(), nullptr, count};
    const std::vector<int32_t> rows{0, static_cast<int32_t>(query.size())};
    return ops::attend_pages(rotate(q, query), rows, query, {&list, 1}, 1, scale, lse);
  }

  at::Tensor attend_moved(const at::Tensor& q, double scale, at::Tensor* lse) {
    const at::Tensor k = rotate(gather(moved_.key), moved_.position);
    pack(moved_.key, moved_.begin, k);
    const auto n = static_cast<int32_t>(query_position_.size());
    std::vector<int32_t> row_start(n + 1), zeros(std::max<size_t>(moved_.key.size(), n), 0);
    std::iota(row_start.begin(), row_start.end(), 0);
    std::vector<float> mass(keys_.mass ? moved_.key.size() : 0);
    std::vector<CachedKeys> lists(n);
    for (int32_t i = 0, page = 0; i < n; ++i) {
      CachedKeys& list = lists[i];
      list.count = moved_.begin[i + 1] - moved_.begin[i];
      list.pages = pages_.data() + page;
      page += (list.count + kPageKeys - 1) / kPageKeys;
      list.position = list.last = zeros.data();  // all are visible to a query at 0
      if (keys_.mass) list.mass = mass.data() + moved_.begin[i];
    }
    at::Tensor out = ops::attend_pages(rotate(q, query_position_), row_start,
                                       std::span(zeros).first(n), lists, 1, scale, lse);
    for (size_t m = 0; m < mass.size(); ++m) keys_.mass[moved_.key[m]] += mass[m];
    return out;
  }

  at::Tensor rotate(const at::Tensor& x, std::vector<int32_t>& positions) const {
    if (!rotate_ || positions.empty()) return x.contiguous();
    const at::Tensor at = at::from_blob(positions.data(), {std::ssize(positions)}, at::kInt);
    return rotate_(x, at).to(dtype_).contiguous();
  }

  // [n, 1, D] of these stored keys.
  at::Tensor gather(const std::vector<int32_t>& which) const {
    at::Tensor k = at::empty({std::ssize(which), 1, d_}, dtype_);
    auto* to = static_cast<Element*>(k.mutable_data_ptr());
    for (const int32_t j : which) {
      const auto* from = static_cast<const Element*>(keys_.pages[j / kPageKeys]) + j % kPageKeys;
      for (int32_t c = 0; c < d_; ++c) to[c] = from[c * kPageKeys];
      to += d_;
    }
    return k;
  }

  // Fills pages_ with the lists [begin[m], begin[m + 1]) of `which`: keys from k, values as stored.
  void pack(const std::vector<int32_t>& which, const std::vector<int32_t>& begin,
            const at::Tensor& k) {
    const auto* key = static_cast<const Element*>(k.const_data_ptr());
    const int64_t page_elements = int64_t{2} * kPageKeys * d_;
    int64_t pages = 0;
    for (size_t i = 0; i + 1 < begin.size(); ++i) {
      pages += (begin[i + 1] - begin[i] + kPageKeys - 1) / kPageKeys;
    }
    packed_ = at::empty({pages * page_elements}, dtype_);
    auto* next = static_cast<Element*>(packed_.mutable_data_ptr());
    pages_.clear();
    for (size_t i = 0; i + 1 < begin.size(); ++i) {
      for (int32_t m = begin[i]; m < begin[i + 1];) {
        const int32_t n = std::min(kPageKeys, begin[i + 1] - m);
        Element* values = next + int64_t{kPageKeys} * d_;
        for (int32_t c = 0; c < d_; ++c) {
          for (int32_t s = 0; s < n; ++s) next[c * kPageKeys + s] = key[int64_t{m + s} * d_ + c];
        }
        for (int32_t s = 0; s < n; ++s) {
          const int32_t j = which[m + s];
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
  int32_t rotary_positions_;
  const CachedKeys& keys_;
  int32_t d_;
  at::ScalarType dtype_;
  std::vector<int32_t> order_;  // stored keys by position
  Reads moved_;
  std::vector<int32_t> in_place_;       // stored keys that some query sees in place, by position
  std::vector<int32_t> in_place_last_;  // [count] the last query that does; -1: none
  std::vector<int32_t> query_position_;
  at::Tensor packed_;
  std::vector<const void*> pages_;
};

template <class Element>
void attend_head(const Policy& policy, const Rotate& rotate, int32_t rotary_positions,
                 const at::Tensor& q, at::Tensor out, std::span<const int32_t> positions,
                 const CachedKeys& keys, double scale) {
  RenumberedHead<Element> head(policy, rotate, rotary_positions, keys,
                               static_cast<int32_t>(q.size(2)), q.scalar_type());
  const int64_t rows = q.size(0);
  for (int64_t row = 0; row < rows;) {
    const int64_t most = std::min<int64_t>(kQueriesAtOnce, rows - row);
    const int64_t n = head.choose(positions.subspan(row, most));
    out.narrow(0, row, n).copy_(head.attend(q.narrow(0, row, n), positions.subspan(row, n), scale));
    row += n;
  }
}

}  // namespace

at::Tensor attend_renumbered(const Policy& policy, const Rotate& rotate, int32_t rotary_positions,
                             const at::Tensor& q, std::span<const int32_t> row_start,
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
      attend(policy, rotate, rotary_positions, part(q), part(out), row_position.subspan(row, n),
             keys[b * kv_heads + h], scale);
    }
  }
  return out;
}

}  // namespace natslm::cache
