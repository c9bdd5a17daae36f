// The evicting key/value cache: ragged per sequence, layer and KV head, paged, dense inside its
// pages (a dead key's place is taken by the head's last key), pages returned as soon as they are
// empty.
//
// bytes() and live_keys() are exact: they are the product's claim. Bytes of a (layer, KV head)
// never exceed those of its live keys by more than one page, between calls.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <memory_resource>
#include <vector>

#include "natslm/cache/policy.h"

namespace natslm::cache {

struct Shape {
  int32_t layers = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
  at::ScalarType dtype = at::kFloat;  // float or bfloat16: of stored keys and values
  at::Device device = at::kCPU;       // where they are stored; on a GPU as bfloat16
  // The model's own limit on who may read a key of a layer, whatever the policy says: the query
  // window - 1 places later is the last. 0: none; empty: none in any layer.
  std::vector<int32_t> windows;  // [layers] or empty

  int32_t window(int32_t layer) const { return windows.empty() ? 0 : windows[layer]; }
  // Of a key and its value in one KV head.
  int64_t key_bytes() const {
    return 2 * int64_t{head_dim} * static_cast<int64_t>(c10::elementSize(dtype));
  }
};

// Rotates x [n, H, D] to the positions [n] (int32); the model supplies it. Rotary: the product of a
// rotated query and a rotated key depends on the difference of their positions alone.
using Rotate = std::function<at::Tensor(const at::Tensor& x, const at::Tensor& positions)>;

// The rows of one step: sequence s of the step owns rows [row_start[s], row_start[s + 1]), lives in
// cache slot `slots[s]` and starts at that slot's next position.
struct Step {
  std::vector<int32_t> slots;
  std::vector<int32_t> row_start;  // slots.size() + 1 entries
};

// What a layer brings to a step; rows in the order of Step.
struct LayerInput {
  at::Tensor q;                  // [rows, Hq, D] before RoPE
  at::Tensor k, v;               // [rows, Hkv, D] before RoPE
  at::Tensor hidden;             // [rows, width]
  at::Tensor score_weight;       // [3 * Hkv, width] or undefined
  Rotate rotate;                 // empty: no rotary embedding
  int32_t rotary_positions = 0;  // `rotate` takes positions below it; 0: unknown, then only
                                 // positions of the text or of the policy are used
  double scale = 1.0;
};

struct Usage {
  int64_t live_keys = 0;       // over all slots, layers and KV heads
  int64_t live_bytes = 0;      // their keys and values
  int64_t held_bytes = 0;      // pages in use
  int64_t metadata_bytes = 0;  // positions, lifetimes, scores, page tables, wherever they are
};

class KvCache {
 public:
  // `policy` is owned; pages come from `memory` (of the shape's device; its memory_resource is
  // asked for nothing but pages of one size), which must outlive the cache. Null: the heap, or a
  // GPU's memory in large blocks through LibTorch's allocator. Throws Error for impossible shapes.
  KvCache(const Shape& shape, std::unique_ptr<Policy> policy,
          std::pmr::memory_resource* memory = nullptr);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;

  // A new, empty sequence; its slot number (freed numbers are used again).
  int32_t add_sequence();
  // Also the way out when a step threw: remove all its sequences.
  void remove_sequence(int32_t slot);
  // Tokens appended so far = position of the next one.
  int32_t length(int32_t slot) const;

  // One layer of one step: decides the new keys' lifetimes, stores them, attends, then evicts what
  // died. Layers must come in order 0 .. layers - 1. Returns [rows, Hq, D], of q's type. No
  // gradient.
  at::Tensor attend(int32_t layer, const Step& step, const LayerInput& input);
  // After the last layer of a step: advances the lengths.
  void finish_step(const Step& step);
  // The prompt of this slot is complete (see Policy::on_prefill_end); call it between steps.
  void finish_prefill(int32_t slot);

  Usage usage() const;  // of now
  Usage usage(int32_t slot) const;
  Usage peak() const;  // each member's highest value so far, sampled inside steps too
  void reset_peak();
  // Live keys of every (layer, KV head) of a slot: [layers][kv_heads].
  std::vector<std::vector<int32_t>> live_per_head(int32_t slot) const;
  // Positions still alive in one (layer, KV head), ascending.
  std::vector<int32_t> live_positions(int32_t slot, int32_t layer, int32_t head) const;

  const Shape& shape() const;
  const Policy& policy() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace natslm::cache
