// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/renumbered.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logaddexp.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace natslm::cache {
namespace {

using kernels::CachedKeys;
using kernels::kPageKeys;
using kernels::PageMove;

// Queries of a list handled at once, and copies of keys made for all lists at once: bounds memory.
constexpr int32_t kQueriesAtOnce = 64;
constexpr int64_t kCopiesAtOnce = int64_t{1} << 18;

// What the next queries of one list read and where they see it.
//
// Only differences of positions count. So a key that a query sees at its distance in the text needs
// no new place: such keys are rotated once for all queries, each as far from the oldest as it is in
// the text ("in place"; counted from the oldest, because a table of angles ends with the model's
// context). The others ("moved", for StreamingLLM the sinks) are copied for each query that sees
// them elsewhere, and every query becomes a sequence of its own for the kernel. The two parts are
// merged by their log-sum-exp.
class ListPlan {
 public:
  ListPlan(const Policy& policy, int32_t rotary_positions, const CachedKeys& keys)
      : policy_(policy), rotary_positions_(rotary_positions), keys_(keys) {
    if (keys.mass) std::fill_n(keys.mass, keys.count, 0.0f);
  }

  // Plans for as many of these queries, from the first on, as can be done at once; says how many.
  int32_t choose(std::span<const int32_t> positions) {
    sort_keys();
    // The mass of a part cannot be rescaled once it is summed over queries.
    if (keys_.mass || !sort_reads(positions, true)) sort_reads(positions, false);
    const auto n = std::ssize(positions);
    int64_t fewer = n;
    if (!reads_.in_place.empty()) {
      const int32_t furthest =
          std::max(rotary_positions_ - 1, *std::ranges::max_element(reads_.query_position));
      const int64_t excess = positions.back() - keys_.position[reads_.in_place[0]] - furthest;
      if (excess > 0) {
        fewer = std::max<int64_t>(1, n - excess);
        sort_reads(positions.first(fewer), true);
      }
    }
    reads_.queries.assign(positions.begin(), positions.begin() + fewer);
    return static_cast<int32_t>(fewer);
  }

  // The same where `other` has chosen from the same queries for keys of the same positions and
  // lifetimes, as the heads of a sequence have them under policies that do not look at the keys:
  // work once for all heads. False if its keys are others.
  bool choose_like(const ListPlan& other) {
    const auto same = [&](const int32_t* mine, const int32_t* theirs) {
      return std::equal(mine, mine + keys_.count, theirs);
    };
    if (keys_.count != other.keys_.count || !same(keys_.position, other.keys_.position) ||
        !same(keys_.last, other.keys_.last)) {
      return false;
    }
    reads_ = other.reads_;
    return true;
  }

  const CachedKeys& keys() const { return keys_; }
  int64_t copies() const { return std::ssize(reads_.in_place) + std::ssize(reads_.moved_key); }
  // Stored keys that some query sees in place, by position.
  const std::vector<int32_t>& in_place() const { return reads_.in_place; }
  int32_t in_place_last(int32_t key) const { return reads_.in_place_last[key]; }
  // Stored keys that are moved, query after query: those of query m are [begin[m], begin[m + 1]).
  const std::vector<int32_t>& moved_key() const { return reads_.moved_key; }
  const std::vector<int32_t>& moved_position() const { return reads_.moved_position; }
  const std::vector<int32_t>& moved_begin() const { return reads_.moved_begin; }
  // Of each query: in the text, and as the policy says.
  const std::vector<int32_t>& queries() const { return reads_.queries; }
  const std::vector<int32_t>& query_position() const { return reads_.query_position; }

 private:
  void sort_keys() {
    if (!order_.empty()) return;
    order_.resize(keys_.count);
    std::iota(order_.begin(), order_.end(), 0);
    std::ranges::sort(order_, {}, [&](int32_t j) { return keys_.position[j]; });
  }

  // Sorts what the queries read into the two parts. False if some key is in place again for a query
  // after one that saw it elsewhere, which a lifetime cannot say; without `in_place` all are moved.
  bool sort_reads(std::span<const int32_t> positions, bool in_place) {
    reads_.moved_key.clear();
    reads_.moved_position.clear();
    reads_.moved_begin = {0};
    reads_.in_place.clear();
    reads_.in_place_last.assign(keys_.count, -1);
    reads_.query_position.clear();
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
          reads_.in_place_last[j] = i;
        } else {
          has_moved[j] = true;
          reads_.moved_key.push_back(j);
          reads_.moved_position.push_back(to);
        }
      }
      reads_.moved_begin.push_back(static_cast<int32_t>(reads_.moved_key.size()));
      reads_.query_position.push_back(query);
    }
    for (const int32_t j : order_) {
      if (reads_.in_place_last[j] >= 0) reads_.in_place.push_back(j);
    }
    return true;
  }

  const Policy& policy_;
  int32_t rotary_positions_;
  CachedKeys keys_;
  std::vector<int32_t> order_;  // stored keys by position
  struct Reads {
    std::vector<int32_t> moved_key, moved_position, moved_begin;
    std::vector<int32_t> in_place;
    std::vector<int32_t> in_place_last;  // [count] the last query that does; -1: none
    std::vector<int32_t> queries, query_position;
  } reads_;
};

// Some queries of some lists, done together.
class Round {
 public:
  Round(PageStorage& storage, const LayerInput& input, std::span<ListPlan* const> plans)
      : storage_(storage), input_(input), plans_(plans) {}

  // q [queries, group, D], list after list; returns the same shape.
  at::Tensor attend(const at::Tensor& q) const {
    bool any_in_place = false, any_moved = false;
    for (const ListPlan* plan : plans_) {
      any_in_place = any_in_place || !plan->in_place().empty();
      any_moved = any_moved || !plan->moved_key().empty();
    }
    if (!any_in_place) return attend_moved(q, nullptr);
    if (!any_moved) return attend_in_place(q, nullptr);
    at::Tensor lse_a, lse_b;
    const at::Tensor a = attend_in_place(q, &lse_a), b = attend_moved(q, &lse_b);
    const at::Tensor lse = at::logaddexp(lse_a, lse_b);
    const auto weighted = [&](const at::Tensor& x, const at::Tensor& part) {
      return x.to(at::kFloat) * (part - lse).exp().nan_to_num(0).unsqueeze(2);
    };
    return (weighted(a, lse_a) + weighted(b, lse_b)).to(q.scalar_type());
  }

 private:
  at::Tensor attend_in_place(const at::Tensor& q, at::Tensor* lse) const {
    std::vector<PageMove> keys;
    std::vector<int32_t> begin{0}, position, last, row_start{0}, query;
    for (const ListPlan* plan : plans_) {
      const std::vector<int32_t>& in_place = plan->in_place();
      const int32_t oldest = in_place.empty() ? 0 : plan->keys().position[in_place[0]];
      for (const int32_t j : in_place) {
        keys.push_back(place(*plan, j));
        position.push_back(plan->keys().position[j] - oldest);
        last.push_back(plan->in_place_last(j) - oldest);
      }
      begin.push_back(static_cast<int32_t>(keys.size()));
      // Without keys in place any position does.
      for (const int32_t i : plan->queries()) query.push_back(in_place.empty() ? 0 : i - oldest);
      row_start.push_back(static_cast<int32_t>(query.size()));
    }
    auto [k, v] = storage_.gather(keys);
    const PackedLists lists{rotate(k, position), v, begin, position, last, nullptr};
    return storage_.attend(lists, {row_start, query}, rotate(q, query), input_.scale, lse);
  }

  at::Tensor attend_moved(const at::Tensor& q, at::Tensor* lse) const {
    std::vector<PageMove> keys;
    std::vector<int32_t> begin{0}, position, query;
    bool with_mass = false;
    for (const ListPlan* plan : plans_) {
      for (const int32_t j : plan->moved_key()) keys.push_back(place(*plan, j));
      position.insert(position.end(), plan->moved_position().begin(), plan->moved_position().end());
      const int32_t before = begin.back();
      for (size_t m = 1; m < plan->moved_begin().size(); ++m) {
        begin.push_back(before + plan->moved_begin()[m]);
      }
      query.insert(query.end(), plan->query_position().begin(), plan->query_position().end());
      with_mass = with_mass || plan->keys().mass;
    }
    // All of a list's keys are visible to its query: both are at 0.
    const std::vector<int32_t> zeros(std::max(keys.size(), query.size()), 0);
    std::vector<int32_t> row_start(query.size() + 1);
    std::iota(row_start.begin(), row_start.end(), 0);
    std::vector<float> mass(with_mass ? keys.size() : 0);
    auto [k, v] = storage_.gather(keys);
    PackedLists lists{rotate(k, position), v, begin, zeros, zeros, nullptr};
    lists.position = lists.last = std::span(zeros).first(keys.size());
    if (with_mass) lists.mass = mass.data();
    const at::Tensor out = storage_.attend(lists, {row_start, std::span(zeros).first(query.size())},
                                           rotate(q, query), input_.scale, lse);
    const float* received = mass.data();
    for (const ListPlan* plan : plans_) {
      if (!plan->keys().mass) continue;
      for (const int32_t j : plan->moved_key()) plan->keys().mass[j] += *received++;
    }
    return out;
  }

  static PageMove place(const ListPlan& plan, int32_t key) {
    return {plan.keys().pages[key / kPageKeys], nullptr, key % kPageKeys, 0};
  }

  // Angles are worth more digits than keys are stored with.
  at::Tensor rotate(const at::Tensor& x, std::vector<int32_t>& positions) const {
    if (!input_.rotate || positions.empty()) return x;
    const at::Tensor at = at::from_blob(positions.data(), {std::ssize(positions)}, at::kInt);
    return input_.rotate(x.to(at::kFloat), at).to(x.scalar_type());
  }

  PageStorage& storage_;
  const LayerInput& input_;
  std::span<ListPlan* const> plans_;
};

}  // namespace

at::Tensor attend_renumbered(const Policy& policy, PageStorage& storage, const LayerInput& input,
                             std::span<const StepList> lists, const StepRows& rows,
                             const at::Tensor& q) {
  const int64_t heads = std::ssize(lists) / (std::ssize(rows.start) - 1);
  std::vector<ListPlan> plans;
  std::vector<int32_t> next;  // row of the step that each list goes on with
  for (size_t list = 0; list < lists.size(); ++list) {
    CachedKeys keys = lists[list].head->cached(policy.wants_mass());
    if (!lists[list].selected.empty()) keys.last = lists[list].selected.data();
    plans.emplace_back(policy, input.rotary_positions, keys);
    next.push_back(rows.start[list / heads]);
  }
  // Row i of KV head h is vector i * heads + h of these.
  const at::Tensor queries = q.contiguous().view({q.size(0) * heads, q.size(1) / heads, q.size(2)});
  at::Tensor out = at::empty_like(queries);

  size_t first = 0;
  while (first < lists.size()) {
    std::vector<ListPlan*> members;
    std::vector<int64_t> vectors;
    int64_t copies = 0;
    for (size_t list = first; list < lists.size() && copies < kCopiesAtOnce; ++list) {
      const int32_t end = rows.start[list / heads + 1];
      if (next[list] == end) continue;
      const int32_t most = std::min(kQueriesAtOnce, end - next[list]);
      // The head before this one is as far, if it did its queries in this round.
      const bool follows = list % heads > 0 && !members.empty() &&
                           members.back() == &plans[list - 1] &&
                           next[list - 1] - next[list] == std::ssize(plans[list - 1].queries());
      const auto n = follows && plans[list].choose_like(plans[list - 1])
                         ? static_cast<int32_t>(plans[list].queries().size())
                         : plans[list].choose(rows.position.subspan(next[list], most));
      for (int32_t i = 0; i < n; ++i) {
        vectors.push_back((next[list] + i) * heads + static_cast<int64_t>(list) % heads);
      }
      next[list] += n;
      copies += plans[list].copies();
      members.push_back(&plans[list]);
    }
    while (first < lists.size() && next[first] == rows.start[first / heads + 1]) ++first;
    if (members.empty()) continue;
    const at::Tensor index =
        at::from_blob(vectors.data(), {std::ssize(vectors)}, at::kLong).to(q.device());
    const Round round(storage, input, members);
    out.index_copy_(0, index, round.attend(queries.index_select(0, index)));
  }
  return out.view(q.sizes());
}

}  // namespace natslm::cache
