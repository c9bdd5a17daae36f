// The memory behind a cache's pages, on the CPU or on a GPU: what is stored there, moved there and
// read from there. What is known of the keys besides (positions, lifetimes, scores) lies in
// HeadStores, on the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <span>
#include <utility>
#include <vector>

#include "natslm/cache/head_store.h"
#include "natslm/cache/kv_cache.h"

namespace natslm::cache {

// One list in a step: KV head `list % Hkv` of the step's sequence `list / Hkv`.
struct StepList {
  HeadStore* head = nullptr;
  int32_t slot = 0, layer = 0, kv_head = 0;
  int32_t before = 0;                 // keys it had when the step began; those after it are new
  std::span<const int32_t> selected;  // lifetimes to attend with instead of the stored ones; empty:
                                      // those
};

// Rows of a step, see cache::Step.
struct StepRows {
  std::span<const int32_t> start;     // [B + 1]
  std::span<const int32_t> position;  // [rows]
};

// Lists that are not the cache's own: list i has keys [begin[i], begin[i + 1]).
struct PackedLists {
  at::Tensor k, v;                    // [keys, 1, D], of the cache's type and device
  std::span<const int32_t> begin;     // [lists + 1]
  std::span<const int32_t> position;  // [keys]
  std::span<const int32_t> last;      // [keys]
  float* mass = nullptr;              // [keys] or null
};

class PageStorage {
 public:
  virtual ~PageStorage() = default;

  // Stores the new keys of a step's lists, whose HeadStores have them already: k and v
  // [rows, Hkv, D], contiguous, rotated or not as the policy wants them.
  virtual void store(std::span<const StepList> lists, const StepRows& rows, const at::Tensor& k,
                     const at::Tensor& v) = 0;
  // Attention of q [rows, Hq, D] over the lists. `with_mass`: fills the masses of the HeadStores.
  virtual at::Tensor attend(std::span<const StepList> lists, const StepRows& rows,
                            const at::Tensor& q, double scale, bool with_mass) = 0;
  virtual void move(std::span<const kernels::PageMove> moves) = 0;

  // Copies keys (from_page and from) out: k and v [keys, 1, D].
  virtual std::pair<at::Tensor, at::Tensor> gather(std::span<const kernels::PageMove> keys) = 0;
  // Attention over other lists than the cache's, one for each sequence of `rows`:
  // q [rows, heads, D]; `lse` [rows, heads] in float.
  virtual at::Tensor attend(const PackedLists& lists, const StepRows& rows, const at::Tensor& q,
                            double scale, at::Tensor* lse) = 0;

  // A slot was emptied.
  virtual void forget(int32_t slot) { (void)slot; }
  // Bytes that the lists of a slot take here besides their pages.
  virtual int64_t table_bytes(int32_t slot) const {
    (void)slot;
    return 0;
  }
};

std::unique_ptr<PageStorage> make_host_storage(const Shape& shape);
// `edits_stored` as in Policy.
std::unique_ptr<PageStorage> make_device_storage(const Shape& shape, bool edits_stored);

// Keys, values and metadata of a page on the shape's device, in bytes.
std::pair<int64_t, int64_t> page_sizes(const Shape& shape);

// Pages cut from larger blocks of a GPU's memory, which come from LibTorch's allocator and go back
// to it when all their pages are back (but for one).
std::unique_ptr<std::pmr::memory_resource> make_device_memory(const at::Device& device);

}  // namespace natslm::cache
