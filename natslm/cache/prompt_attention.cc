// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/prompt_attention.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/ops/attention.h"

namespace natslm::cache {
namespace {

// The distance that most keys live, those that live for ever apart: of policies with a window, the
// window's.
int32_t commonest_reach(std::span<const std::span<const int32_t>> last) {
  const auto keys = static_cast<int32_t>(last[0].size());
  std::vector<int32_t> keys_of(size_t(keys) + 1);
  for (const auto& list : last) {
    for (int32_t j = 0; j < keys; ++j) {
      if (list[j] < kOpenEnded) ++keys_of[std::clamp(list[j] - j, 0, keys)];
    }
  }
  return static_cast<int32_t>(std::ranges::max_element(keys_of) - keys_of.begin());
}

at::Tensor on_device(const std::vector<int32_t>& numbers, at::IntArrayRef shape,
                     const at::Device& device) {
  return at::from_blob(const_cast<int32_t*>(numbers.data()), shape, at::kInt)
      .to(device, at::kInt, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace

PromptOrder prompt_order(std::span<const std::span<const int32_t>> last) {
  PromptOrder found;
  const auto keys = last.empty() ? 0 : static_cast<int32_t>(last[0].size());
  if (keys == 0) return found;
  int64_t pairs = 0;
  for (const auto& list : last) {
    for (int32_t j = 0; j < keys; ++j) pairs += queries_served(j, list[j], keys);
  }
  found.density = double(pairs) / (double(last.size()) * keys * (keys + 1.0) / 2);
  found.reach = commonest_reach(last);
  const auto segment = [&](int32_t j, int32_t its_last) {
    return its_last == kForever ? 0 : int64_t{its_last} - j > found.reach ? 1 : 2;
  };
  for (const auto& list : last) {
    int32_t place = 0, latest = 0;  // latest: `last` of the newest key of segment 1
    for (int wanted = 0; wanted < kernels::KeyOrder::kSegments; ++wanted) {
      for (int32_t j = 0; j < keys; ++j) {
        if (segment(j, list[j]) != wanted) continue;
        if (wanted == 1 && list[j] < latest) return {{}, {}, 0, found.density};
        if (wanted == 1) latest = list[j];
        found.order.push_back(j);
        ++place;
      }
      found.ends.push_back(place);
    }
  }
  return found;
}

at::Tensor attend_prompt(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         std::span<const std::span<const int32_t>> last, double scale) {
  const int64_t keys = q.size(0), heads = std::ssize(last);
  const PromptOrder order = prompt_order(last);
  std::vector<int32_t> all;
  for (const auto& list : last) all.insert(all.end(), list.begin(), list.end());
  ops::AttentionHints hints;
  hints.density = order.density;
  hints.reach = order.reach;
  if (!order.order.empty()) {
    hints.order = on_device(order.order, {1, heads, keys}, q.device());
    hints.ends = on_device(order.ends, {1, heads, kernels::KeyOrder::kSegments}, q.device());
  }
  const auto batched = [](const at::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };
  return ops::attention(batched(q), batched(k), batched(v),
                        on_device(all, {1, heads, keys}, q.device()), std::nullopt, scale,
                        std::nullopt, /*want_mass=*/false, hints)
      .out[0]
      .transpose(0, 1);
}

}  // namespace natslm::cache
