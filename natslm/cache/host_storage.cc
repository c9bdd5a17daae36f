// Pages in the CPU's memory: [D, kPageKeys] keys, then [kPageKeys, D] values.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>

#include <algorithm>

#include "natslm/base/error.h"
#include "natslm/cache/page_storage.h"
#include "natslm/kernels/gpu_head_dim.h"
#include "natslm/ops/decode.h"

namespace natslm::cache {
namespace {

using kernels::CachedKeys;
using kernels::kPageKeys;
using kernels::PageMove;

// What is done to single elements, whose type has so many bytes.
template <class Element>
struct Pages {
  int32_t d;

  int64_t elements() const { return int64_t{2} * kPageKeys * d; }
  // Rows of k and v, row_stride apart, go to the pages from key number `begin` on.
  void store(void* const* pages, int32_t begin, const void* from_k, const void* from_v,
             int64_t row_stride, int32_t rows) const {
    const auto *k = static_cast<const Element*>(from_k), *v = static_cast<const Element*>(from_v);
    for (int32_t t = 0; t < rows;) {
      const int32_t slot = (begin + t) % kPageKeys;
      const int32_t n = std::min(rows - t, kPageKeys - slot);
      auto* keys = static_cast<Element*>(pages[(begin + t) / kPageKeys]);
      Element* values = keys + int64_t{d} * kPageKeys;
      for (int32_t c = 0; c < d; ++c) {
        for (int32_t j = 0; j < n; ++j) {
          keys[c * kPageKeys + slot + j] = k[(t + j) * row_stride + c];
        }
      }
      for (int32_t j = 0; j < n; ++j) {
        std::copy_n(v + (t + j) * row_stride, d, values + int64_t{slot + j} * d);
      }
      t += n;
    }
  }

  void move(const PageMove& m) const {
    const auto* source = static_cast<const Element*>(m.from_page);
    auto* target = static_cast<Element*>(m.to_page);
    for (int32_t c = 0; c < d; ++c) target[c * kPageKeys + m.to] = source[c * kPageKeys + m.from];
    const int64_t values = int64_t{d} * kPageKeys;
    std::copy_n(source + values + int64_t{m.from} * d, d, target + values + int64_t{m.to} * d);
  }

  void copy_out(const PageMove& m, void* to_k, void* to_v, int64_t key) const {
    const auto* source = static_cast<const Element*>(m.from_page);
    Element* k = static_cast<Element*>(to_k) + key * d;
    for (int32_t c = 0; c < d; ++c) k[c] = source[c * kPageKeys + m.from];
    std::copy_n(source + (int64_t{kPageKeys} + m.from) * d, d,
                static_cast<Element*>(to_v) + key * d);
  }
};

class HostStorage final : public PageStorage {
 public:
  explicit HostStorage(const Shape& shape)
      : shape_(shape), wide_(size_of(ops::dtype_of(shape.dtype)) == 4) {}

  void store(std::span<const StepList> lists, const StepRows& rows, const at::Tensor& k,
             const at::Tensor& v) override {
    for (size_t list = 0; list < lists.size(); ++list) {
      const size_t b = list / shape_.kv_heads;
      const int64_t at = (int64_t{rows.start[b]} * shape_.kv_heads + lists[list].kv_head) *
                         shape_.head_dim * k.element_size();
      const HeadStore& head = *lists[list].head;
      with_pages([&](const auto& pages) {
        pages.store(head.pages().data(), lists[list].before,
                    static_cast<const char*>(k.const_data_ptr()) + at,
                    static_cast<const char*>(v.const_data_ptr()) + at,
                    int64_t{shape_.kv_heads} * shape_.head_dim, head.count() - lists[list].before);
      });
    }
  }

  at::Tensor attend(std::span<const StepList> lists, const StepRows& rows, const at::Tensor& q,
                    double scale, bool with_mass) override {
    std::vector<CachedKeys> keys;
    for (const StepList& list : lists) {
      keys.push_back(list.head->cached(with_mass));
      if (!list.selected.empty()) keys.back().last = list.selected.data();
    }
    return ops::attend_pages(q, rows.start, rows.position, keys, shape_.kv_heads, scale);
  }

  void move(std::span<const PageMove> moves) override {
    with_pages([&](const auto& pages) {
      for (const PageMove& m : moves) pages.move(m);
    });
  }

  std::pair<at::Tensor, at::Tensor> gather(std::span<const PageMove> keys) override {
    const auto options = at::TensorOptions(shape_.dtype);
    at::Tensor k = at::empty({std::ssize(keys), 1, shape_.head_dim}, options);
    at::Tensor v = at::empty(k.sizes(), options);
    with_pages([&](const auto& pages) {
      for (int64_t i = 0; i < std::ssize(keys); ++i) {
        pages.copy_out(keys[i], k.mutable_data_ptr(), v.mutable_data_ptr(), i);
      }
    });
    return {k, v};
  }

  at::Tensor attend(const PackedLists& lists, const StepRows& rows, const at::Tensor& q,
                    double scale, at::Tensor* lse) override {
    std::vector<void*> table;
    std::vector<CachedKeys> keys;
    int64_t pages = 0;
    for (size_t i = 0; i + 1 < lists.begin.size(); ++i) {
      pages += (lists.begin[i + 1] - lists.begin[i] + kPageKeys - 1) / kPageKeys;
    }
    const int64_t page_bytes = page_sizes(shape_).first;
    at::Tensor memory = at::empty({pages * page_bytes + 64}, at::kByte);
    auto* next = static_cast<uint8_t*>(memory.mutable_data_ptr());
    next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64;
    for (int64_t i = 0; i < pages; ++i, next += page_bytes) table.push_back(next);
    const at::Tensor k = lists.k.contiguous(), v = lists.v.contiguous();
    void* const* first = table.data();
    for (size_t i = 0; i + 1 < lists.begin.size(); ++i) {
      const int32_t begin = lists.begin[i], count = lists.begin[i + 1] - begin;
      const int64_t at = int64_t{begin} * shape_.head_dim * k.element_size();
      with_pages([&](const auto& writer) {
        writer.store(first, 0, static_cast<const char*>(k.const_data_ptr()) + at,
                     static_cast<const char*>(v.const_data_ptr()) + at, shape_.head_dim, count);
      });
      keys.push_back({.pages = first,
                      .position = lists.position.data() + begin,
                      .last = lists.last.data() + begin,
                      .mass = lists.mass ? lists.mass + begin : nullptr,
                      .count = count});
      first += (count + kPageKeys - 1) / kPageKeys;
    }
    return ops::attend_pages(q, rows.start, rows.position, keys, 1, scale, lse);
  }

 private:
  template <class Body>
  void with_pages(const Body& body) const {
    if (wide_) {
      body(Pages<uint32_t>{shape_.head_dim});
    } else {
      body(Pages<uint16_t>{shape_.head_dim});
    }
  }

  Shape shape_;
  bool wide_;
};

}  // namespace

std::unique_ptr<PageStorage> make_host_storage(const Shape& shape) {
  return std::make_unique<HostStorage>(shape);
}

std::pair<int64_t, int64_t> page_sizes(const Shape& shape) {
  const bool on_gpu = !shape.device.is_cpu();
  const int32_t head_dim = on_gpu ? kernels::gpu_head_dim(shape.head_dim) : shape.head_dim;
  return {kernels::page_bytes(head_dim, ops::dtype_of(shape.dtype)),
          on_gpu ? kernels::GpuPage::kMetadataBytes : 0};
}

}  // namespace natslm::cache
