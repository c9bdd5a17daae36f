// Pages in a GPU's memory, laid out as kernels::GpuPage; heads of other sizes than the kernels'
// (kernels/gpu_head_dim.h) are filled up with zeros. Of every list the device has a table of
// its pages; of every key the pages have position and last. Per layer and step, one packet goes up
// and one kernel stores new keys and changed lifetimes; one goes up for attention; one, if keys
// died, for the moves. Nothing waits for the device but masses, which come back to the host.
//
// All of it runs on LibTorch's current stream, so a page may be given back and used again while
// what was launched on it before is still to run. SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <unordered_map>

#include "natslm/base/error.h"
#include "natslm/cache/page_storage.h"
#include "natslm/kernels/gpu_head_dim.h"
#include "natslm/ops/decode.h"
#include "natslm/ops/upload.h"

namespace natslm::cache {
namespace {

using kernels::CachedKeys;
using kernels::GpuPage;
using kernels::kPageKeys;
using kernels::PageAppend;
using kernels::PageEdit;
using kernels::PageMove;
using ops::Upload;

int32_t pages_for(int32_t keys) {
  return (keys + kPageKeys - 1) / kPageKeys;
}

// Where page tables of the lists of one slot lie on the device: [layers * Hkv, capacity] pointers.
class PageTables {
 public:
  PageTables(const Shape& shape, const at::Device& device)
      : lists_(int64_t{shape.layers} * shape.kv_heads), device_(device) {}

  // Makes room for `pages` in every table; what is there stays.
  void reserve(int64_t pages) {
    if (pages <= capacity_) return;
    const int64_t larger = std::max({pages, 2 * capacity_, int64_t{8}});
    at::Tensor memory = at::empty({lists_, larger}, at::TensorOptions(at::kLong).device(device_));
    if (capacity_ > 0) memory.narrow(1, 0, capacity_).copy_(memory_);
    memory_ = std::move(memory);
    capacity_ = larger;
  }
  void** of(int64_t list) const {
    return static_cast<void**>(memory_.mutable_data_ptr()) + list * capacity_;
  }
  int64_t bytes() const { return lists_ * capacity_ * int64_t{sizeof(void*)}; }

 private:
  int64_t lists_, capacity_ = 0;
  at::Device device_;
  at::Tensor memory_;
};

// What a kernel needs of one list for attention, apart from its place in a packet.
struct ListOnDevice {
  void* const* table = nullptr;       // device memory
  std::span<const int32_t> selected;  // on the host; empty: as the pages have it
  float* mass = nullptr;              // on the host, or null
  int32_t count = 0;
};

class DeviceStorage final : public PageStorage {
 public:
  DeviceStorage(const Shape& shape, bool edits_stored)
      : shape_(shape),
        layout_{kernels::gpu_head_dim(shape.head_dim)},
        edits_stored_(edits_stored) {}

  void store(std::span<const StepList> lists, const StepRows& rows, const at::Tensor& k_rows,
             const at::Tensor& v_rows) override {
    const at::Tensor k = ops::gpu_heads(k_rows), v = ops::gpu_heads(v_rows);
    Upload packet;
    std::vector<PageAppend> appends(lists.size());
    std::vector<PageEdit> edits;
    std::vector<std::pair<Upload::Place, Upload::Place>> arrays(lists.size());  // pages, last
    // Before any pointer into a table is taken: making room moves all tables of a slot.
    for (const StepList& list : lists) {
      if (list.head->count() == list.before) continue;
      PageTables& tables = tables_.try_emplace(list.slot, shape_, shape_.device).first->second;
      tables.reserve(pages_for(list.head->count()));
    }
    for (size_t i = 0; i < lists.size(); ++i) {
      const StepList& list = lists[i];
      HeadStore& head = *list.head;
      if (edits_stored_) change_lifetimes(head, list.before, edits);
      if (head.count() == list.before) continue;
      const int32_t first = list.before / kPageKeys;
      appends[i].table = table_of(list) + first;
      appends[i].begin = list.before;
      appends[i].first_position = head.position()[list.before];
      arrays[i] = {packet.add(std::span(head.pages()).subspan(first)),
                   packet.add(std::span(head.last()).subspan(list.before))};
    }
    const Upload::Place row_start = packet.add(rows.start), edit = packet.add(edits);
    const Upload::Place append = packet.add(appends);
    for (size_t i = 0; i < lists.size(); ++i) {
      if (lists[i].head->count() == lists[i].before) continue;
      const Upload::Place at = append + i * sizeof(PageAppend);
      packet.point(at + offsetof(PageAppend, pages), arrays[i].first);
      packet.point(at + offsetof(PageAppend, last), arrays[i].second);
    }
    const Upload::Sent sent = packet.send(shape_.device);
    kernels::PageUpdate update;
    update.batch = static_cast<int32_t>(rows.start.size()) - 1;
    update.kv_heads = shape_.kv_heads;
    update.head_dim = layout_.head_dim;
    update.rows = rows.start.back();
    update.row_start = sent.at<int32_t>(row_start);
    update.k = k.const_data_ptr();
    update.v = v.const_data_ptr();
    update.appends = sent.at<PageAppend>(append);
    update.edits = sent.at<PageEdit>(edit);
    update.edit_count = static_cast<int32_t>(edits.size());
    ops::run_on(shape_.device, update);
  }

  at::Tensor attend(std::span<const StepList> lists, const StepRows& rows, const at::Tensor& q,
                    double scale, bool with_mass) override {
    std::vector<ListOnDevice> all;
    for (const StepList& list : lists) {
      const CachedKeys keys = list.head->cached(with_mass);
      all.push_back(
          {keys.count > 0 ? table_of(list) : nullptr, list.selected, keys.mass, keys.count});
    }
    Upload packet;
    return attend(packet, all, rows, q, shape_.kv_heads, scale, nullptr);
  }

  void move(std::span<const PageMove> moves) override {
    if (moves.empty()) return;
    Upload packet;
    const Upload::Place place = packet.add(moves);
    const Upload::Sent sent = packet.send(shape_.device);
    ops::run_on(shape_.device, kernels::PageMoves{static_cast<int32_t>(moves.size()),
                                                  layout_.head_dim, sent.at<PageMove>(place)});
  }

  std::pair<at::Tensor, at::Tensor> gather(std::span<const PageMove> keys) override {
    Upload packet;
    const Upload::Place place = packet.add(keys);
    const Upload::Sent sent = packet.send(shape_.device);
    const auto options = at::TensorOptions(shape_.dtype).device(shape_.device);
    at::Tensor k = at::empty({std::ssize(keys), 1, layout_.head_dim}, options);
    at::Tensor v = at::empty(k.sizes(), options);
    ops::run_on(shape_.device, kernels::PageGather{static_cast<int32_t>(keys.size()),
                                                   layout_.head_dim, sent.at<PageMove>(place),
                                                   k.mutable_data_ptr(), v.mutable_data_ptr()});
    const auto own = [&](const at::Tensor& x) {
      return x.narrow(2, 0, shape_.head_dim).contiguous();
    };
    return {own(k), own(v)};
  }

  at::Tensor attend(const PackedLists& lists, const StepRows& rows, const at::Tensor& q,
                    double scale, at::Tensor* lse) override {
    const auto count = static_cast<int32_t>(lists.begin.size()) - 1;
    int64_t pages = 0;
    for (int32_t i = 0; i < count; ++i) pages += pages_for(lists.begin[i + 1] - lists.begin[i]);
    const at::Tensor memory =
        at::empty({pages * layout_.bytes()}, at::TensorOptions(at::kByte).device(shape_.device));
    std::vector<void*> table;
    for (int64_t i = 0; i < pages; ++i) {
      table.push_back(static_cast<uint8_t*>(memory.mutable_data_ptr()) + i * layout_.bytes());
    }
    Upload packet;
    const Upload::Place tables = packet.add(table), begin = packet.add(lists.begin),
                        position = packet.add(lists.position), last = packet.add(lists.last);
    std::vector<PageAppend> appends(count);
    const Upload::Place append = packet.add(appends);
    Upload::Place first = tables;
    std::vector<Upload::Place> first_of(count);
    for (int32_t i = 0; i < count; ++i) {
      const Upload::Place at = append + i * sizeof(PageAppend);
      const Upload::Place offset = lists.begin[i] * sizeof(int32_t);
      packet.point(at + offsetof(PageAppend, pages), first);
      packet.point(at + offsetof(PageAppend, position), position + offset);
      packet.point(at + offsetof(PageAppend, last), last + offset);
      first_of[i] = first;
      first += pages_for(lists.begin[i + 1] - lists.begin[i]) * sizeof(void*);
    }
    const Upload::Sent sent = packet.send(shape_.device);
    const at::Tensor k = ops::gpu_heads(lists.k), v = ops::gpu_heads(lists.v);
    kernels::PageUpdate update;
    update.batch = count;
    update.kv_heads = 1;
    update.head_dim = layout_.head_dim;
    update.rows = lists.begin[count];
    update.row_start = sent.at<int32_t>(begin);
    update.k = k.const_data_ptr();
    update.v = v.const_data_ptr();
    update.appends = sent.at<PageAppend>(append);
    ops::run_on(shape_.device, update);

    std::vector<ListOnDevice> all(count);
    for (int32_t i = 0; i < count; ++i) {
      all[i].table = sent.at<void*>(first_of[i]);
      all[i].count = lists.begin[i + 1] - lists.begin[i];
      if (lists.mass) all[i].mass = lists.mass + lists.begin[i];
    }
    Upload second;
    return attend(second, all, rows, q, 1, scale, lse);
  }

  void forget(int32_t slot) override { tables_.erase(slot); }

  int64_t table_bytes(int32_t slot) const override {
    const auto at = tables_.find(slot);
    return at == tables_.end() ? 0 : at->second.bytes();
  }

 private:
  void** table_of(const StepList& list) {
    return tables_.at(list.slot).of(int64_t{list.layer} * shape_.kv_heads + list.kv_head);
  }

  // Finds the lifetimes of the first `stored` keys that the pages do not have yet, and notes what
  // they will have when the new keys are stored too.
  void change_lifetimes(HeadStore& head, int32_t stored, std::vector<PageEdit>& edits) const {
    const std::vector<int32_t>& last = head.last();
    std::vector<int32_t>& in_pages = head.last_in_pages();
    for (int32_t j = 0; j < stored; ++j) {
      if (last[j] == in_pages[j]) continue;
      auto* page = static_cast<uint8_t*>(head.pages()[j / kPageKeys]);
      edits.push_back({reinterpret_cast<int32_t*>(page + layout_.last()) + j % kPageKeys, last[j]});
      in_pages[j] = last[j];
    }
    in_pages.insert(in_pages.end(), last.begin() + stored, last.end());
  }

  at::Tensor attend(Upload& packet, std::span<const ListOnDevice> lists, const StepRows& rows,
                    const at::Tensor& q, int32_t kv_heads, double scale, at::Tensor* lse) const {
    std::vector<CachedKeys> keys(lists.size());
    std::vector<Upload::Place> selected(lists.size());
    int64_t with_mass = 0;
    ops::DeviceLists on_device;
    for (size_t i = 0; i < lists.size(); ++i) {
      keys[i].pages = lists[i].table;
      keys[i].count = lists[i].count;
      if (!lists[i].selected.empty()) selected[i] = packet.add(lists[i].selected);
      if (lists[i].mass) with_mass += lists[i].count;
      on_device.max_count = std::max(on_device.max_count, lists[i].count);
    }
    on_device.mass = with_mass > 0;
    const at::Tensor mass =
        at::empty({with_mass}, at::TensorOptions(at::kFloat).device(shape_.device));
    auto* next = with_mass > 0 ? mass.mutable_data_ptr<float>() : nullptr;
    for (size_t i = 0; i < lists.size(); ++i) {
      if (!lists[i].mass) continue;
      keys[i].mass = next;
      next += lists[i].count;
    }
    const Upload::Place table = packet.add(keys), row_start = packet.add(rows.start),
                        position = packet.add(rows.position);
    for (size_t i = 0; i < lists.size(); ++i) {
      if (lists[i].selected.empty()) continue;
      packet.point(table + i * sizeof(CachedKeys) + offsetof(CachedKeys, last), selected[i]);
    }
    const Upload::Sent sent = packet.send(shape_.device);
    on_device.keys = sent.at<CachedKeys>(table);
    on_device.row_start = sent.at<int32_t>(row_start);
    on_device.row_position = sent.at<int32_t>(position);
    at::Tensor out = ops::attend_pages(q, rows.start, on_device, kv_heads, scale, lse);
    if (with_mass > 0) {
      const at::Tensor received = mass.cpu();
      const float* from = received.const_data_ptr<float>();
      for (const ListOnDevice& list : lists) {
        if (!list.mass) continue;
        std::copy_n(from, list.count, list.mass);
        from += list.count;
      }
    }
    return out;
  }

  Shape shape_;
  GpuPage layout_;
  bool edits_stored_;
  std::unordered_map<int32_t, PageTables> tables_;  // by slot
};

}  // namespace

std::unique_ptr<PageStorage> make_device_storage(const Shape& shape, bool edits_stored) {
  return std::make_unique<DeviceStorage>(shape, edits_stored);
}

}  // namespace natslm::cache
