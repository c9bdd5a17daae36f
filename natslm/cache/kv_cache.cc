// SPDX-License-Identifier: Apache-2.0
#include "natslm/cache/kv_cache.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/cache/head_store.h"
#include "natslm/cache/page_pool.h"
#include "natslm/cache/page_storage.h"
#include "natslm/cache/prompt_attention.h"
#include "natslm/cache/renumbered.h"
#include "natslm/kernels/gpu_head_dim.h"
#include "natslm/ops/decode.h"

namespace natslm::cache {
namespace {

struct Sequence {
  bool in_use = false;
  int32_t length = 0;
  std::vector<HeadStore> heads;            // [layers * Hkv]
  std::vector<at::Tensor> recent_queries;  // [layers], each [up to query_window(), Hq, D]
};

void raise_to(Usage& peak, const Usage& now) {
  peak.live_keys = std::max(peak.live_keys, now.live_keys);
  peak.live_bytes = std::max(peak.live_bytes, now.live_bytes);
  peak.held_bytes = std::max(peak.held_bytes, now.held_bytes);
  peak.metadata_bytes = std::max(peak.metadata_bytes, now.metadata_bytes);
}

void check_shape(const Shape& shape) {
  NATSLM_CHECK(shape.layers >= 1 && shape.kv_heads >= 1 && shape.head_dim >= 1,
               "cache: layers, KV heads and head size must be positive, got ", shape.layers, ", ",
               shape.kv_heads, ", ", shape.head_dim);
  NATSLM_CHECK(shape.q_heads >= 1 && shape.q_heads % shape.kv_heads == 0, "cache: ", shape.q_heads,
               " query heads cannot share ", shape.kv_heads, " KV heads evenly");
  NATSLM_CHECK(shape.head_dim % 8 == 0 && shape.head_dim <= 256,
               "cache: head size must be a multiple of 8 up to 256, got ", shape.head_dim);
  ops::dtype_of(shape.dtype);  // says what types there are
  NATSLM_CHECK(shape.windows.empty() || std::ssize(shape.windows) == shape.layers,
               "cache: ", shape.windows.size(), " windows do not fit ", shape.layers, " layers");
  for (const int32_t window : shape.windows) {
    NATSLM_CHECK(window >= 0, "cache: the window of a layer is ", window, "; 0 means none");
  }
  if (shape.device.is_cpu()) return;
  NATSLM_CHECK(shape.device.is_cuda(), "cache: there is no cache on device ", shape.device.str(),
               "; use cpu or cuda");
  NATSLM_CHECK(shape.dtype == at::kBFloat16, "cache: on a GPU keys are stored as bfloat16, not ",
               toString(shape.dtype));
  kernels::AttentionDecode decode;
  decode.q_heads = shape.q_heads;
  decode.kv_heads = shape.kv_heads;
  decode.head_dim = kernels::gpu_head_dim(shape.head_dim);
  decode.dtype = DType::kBFloat16;
  const std::string_view why = kernels::cuda::why_not(decode);
  NATSLM_CHECK(why.empty(), "cache: ", why, "; got ", shape.q_heads, " query and ", shape.kv_heads,
               " KV heads of ", shape.head_dim);
}

}  // namespace

struct KvCache::Impl {
  Impl(const Shape& its_shape, std::unique_ptr<Policy> its_policy,
       std::pmr::memory_resource* memory)
      : shape(its_shape),
        policy(std::move(its_policy)),
        own_memory(memory || shape.device.is_cpu() ? nullptr : make_device_memory(shape.device)),
        pool(page_sizes(shape).first, page_sizes(shape).second,
             memory       ? memory
             : own_memory ? own_memory.get()
                          : std::pmr::new_delete_resource()),
        storage(shape.device.is_cpu() ? make_host_storage(shape)
                                      : make_device_storage(shape, policy->edits_stored())) {}

  ~Impl() {
    for (Sequence& sequence : sequences) {
      for (HeadStore& head : sequence.heads) head.clear(evicted);
    }
    give_back();
  }

  Sequence& sequence(int32_t slot) {
    NATSLM_CHECK(slot >= 0 && slot < std::ssize(sequences) && sequences[slot].in_use,
                 "cache: slot ", slot, " holds no sequence; add_sequence() gives a slot");
    return sequences[slot];
  }

  std::span<HeadStore> heads(int32_t slot, int32_t layer) {
    return std::span(sequences[slot].heads).subspan(layer * shape.kv_heads, shape.kv_heads);
  }

  std::vector<StoredKeys> stored(int32_t slot, int32_t layer) {
    std::vector<StoredKeys> all;
    for (HeadStore& head : heads(slot, layer)) all.push_back(head.view());
    return all;
  }

  // What is known of a head's keys, on the host and in its pages.
  int64_t metadata_of(const HeadStore& head) const {
    return head.metadata_bytes() + std::ssize(head.pages()) * pool.metadata_bytes();
  }
  // Runs `change` on one head and keeps the totals exact.
  template <class Change>
  void account(HeadStore& head, const Change& change) {
    const int64_t keys = head.count(), metadata = metadata_of(head);
    change();
    live_keys += head.count() - keys;
    metadata_bytes += metadata_of(head) - metadata;
  }
  // Does what evictions left to do.
  void give_back() {
    storage->move(evicted.moves);
    for (void* page : evicted.pages) pool.give_back(page);
    evicted.clear();
  }

  int64_t key_bytes() const { return pool.key_bytes() / kernels::kPageKeys; }
  Usage usage() const {
    int64_t metadata = metadata_bytes;
    for (size_t slot = 0; slot < sequences.size(); ++slot) {
      metadata += storage->table_bytes(static_cast<int32_t>(slot));
    }
    return {live_keys, live_keys * key_bytes(), pool.held_bytes(), metadata};
  }

  void check_step(int32_t layer, const Step& step, const LayerInput& input);
  // Decides the lifetimes of a sequence's new keys; the lists know them then, the pages not yet.
  void append(int32_t layer, int32_t slot, int32_t begin, int32_t rows, const LayerInput& input,
              const at::Tensor& k, const at::Tensor& v);
  void end_windows(int32_t layer, int32_t slot, NewKeys& fresh);
  void keep_queries(int32_t layer, const Step& step, const at::Tensor& q);
  // Hides from a step's queries what select() says; the lifetimes to use instead, one list a head.
  std::vector<std::vector<int32_t>> selected(int32_t layer, const Step& step, const at::Tensor& q);
  void evict(int32_t slot, int32_t layer, int32_t now);
  // Attention of a step's queries over its lists, prompts that begin here (prompt_attention.h)
  // apart.
  at::Tensor attend_step(std::span<const StepList> lists, const StepRows& rows, double scale,
                         const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);
  at::Tensor attend(int32_t layer, const Step& step, const LayerInput& input);

  Shape shape;
  std::unique_ptr<Policy> policy;
  std::unique_ptr<std::pmr::memory_resource> own_memory;
  PagePool pool;
  std::unique_ptr<PageStorage> storage;
  Evicted evicted;  // empty between calls
  std::vector<Sequence> sequences;
  int32_t next_layer = 0;  // of the step under way
  int64_t live_keys = 0, metadata_bytes = 0;
  Usage peak;
};

void KvCache::Impl::check_step(int32_t layer, const Step& step, const LayerInput& input) {
  NATSLM_CHECK(layer == next_layer, "cache: layer ", layer, " came where layer ", next_layer,
               " was expected; call attend() for every layer in order, then finish_step()");
  NATSLM_CHECK(step.row_start.size() == step.slots.size() + 1 && step.row_start[0] == 0 &&
                   std::ranges::is_sorted(step.row_start),
               "cache: a step of ", step.slots.size(), " sequences needs ", step.slots.size() + 1,
               " ascending row starts from 0");
  for (size_t s = 0; s < step.slots.size(); ++s) {
    const int64_t rows = step.row_start[s + 1] - step.row_start[s];
    NATSLM_CHECK(sequence(step.slots[s]).length + rows <= kMaxPosition, "cache: sequence of slot ",
                 step.slots[s], " would be longer than ", kMaxPosition, " tokens");
    NATSLM_CHECK(std::count(step.slots.begin(), step.slots.end(), step.slots[s]) == 1,
                 "cache: slot ", step.slots[s], " appears twice in one step");
  }
  const int64_t rows = step.row_start.back();
  const auto check = [&](const char* name, const at::Tensor& x, int64_t heads) {
    NATSLM_CHECK(x.defined() && x.dim() == 3 && x.size(0) == rows && x.size(1) == heads &&
                     x.size(2) == shape.head_dim,
                 "cache: ", name, " must be [", rows, ", ", heads, ", ", shape.head_dim, "]");
    NATSLM_CHECK(x.device().type() == shape.device.type(), "cache: ", name, " is on ",
                 x.device().str(), ", the cache on ", shape.device.str());
  };
  check("q", input.q, shape.q_heads);
  check("k", input.k, shape.kv_heads);
  check("v", input.v, shape.kv_heads);
}

void KvCache::Impl::append(int32_t layer, int32_t slot, int32_t begin, int32_t rows,
                           const LayerInput& input, const at::Tensor& k, const at::Tensor& v) {
  NewKeys fresh;
  fresh.slot = slot;
  fresh.layer = layer;
  fresh.first_position = sequences[slot].length;
  fresh.hidden = input.hidden.defined() ? input.hidden.narrow(0, begin, rows) : at::Tensor();
  fresh.score_weight = input.score_weight;
  fresh.k = k.narrow(0, begin, rows);
  fresh.v = v.narrow(0, begin, rows);
  fresh.last = at::full({shape.kv_heads, rows}, kForever, at::kInt);
  std::vector<StoredKeys> before = stored(slot, layer);
  policy->on_append(fresh, before);
  NATSLM_ASSERT(fresh.last.is_contiguous() && fresh.last.scalar_type() == at::kInt &&
                fresh.last.sizes() == at::IntArrayRef({shape.kv_heads, rows}));

  end_windows(layer, slot, fresh);
  const int32_t* last = fresh.last.const_data_ptr<int32_t>();
  for (int32_t h = 0; h < shape.kv_heads; ++h) {
    HeadStore& head = heads(slot, layer)[h];
    account(head, [&] {
      head.reserve(pool, rows);
      head.append(fresh.first_position, {last + int64_t{h} * rows, static_cast<size_t>(rows)},
                  policy->wants_mass());
    });
  }
}

// A policy does not know of the model's window. If it may change lifetimes later (open-ended ones
// above all), a key is given the window's end in the step that reaches it; else at once.
void KvCache::Impl::end_windows(int32_t layer, int32_t slot, NewKeys& fresh) {
  const int32_t window = shape.window(layer);
  if (window == 0) return;
  const int64_t rows = fresh.last.size(1), now = fresh.first_position + rows;
  const auto end = [&](int64_t position, int32_t& last) {
    const int64_t window_end = position + window - 1;
    if (policy->edits_stored() && window_end >= now) return;
    last = static_cast<int32_t>(std::min<int64_t>(last, window_end));
  };
  int32_t* last = fresh.last.mutable_data_ptr<int32_t>();
  for (int32_t h = 0; h < shape.kv_heads; ++h) {
    for (int64_t row = 0; row < rows; ++row) {
      end(fresh.first_position + row, last[h * rows + row]);
    }
    if (!policy->edits_stored()) continue;  // theirs were ended when they came
    const StoredKeys keys = heads(slot, layer)[h].view();
    for (size_t j = 0; j < keys.last.size(); ++j) end(keys.position[j], keys.last[j]);
  }
}

void KvCache::Impl::keep_queries(int32_t layer, const Step& step, const at::Tensor& q) {
  const int64_t window = policy->query_window();
  if (window <= 0) return;
  for (size_t s = 0; s < step.slots.size(); ++s) {
    const int64_t rows = step.row_start[s + 1] - step.row_start[s];
    at::Tensor& recent = sequences[step.slots[s]].recent_queries[layer];
    at::Tensor all = q.narrow(0, step.row_start[s], rows);
    if (recent.defined()) all = at::cat({recent, all});
    const int64_t kept = std::min(window, all.size(0));
    recent = all.narrow(0, all.size(0) - kept, kept).clone();
  }
}

std::vector<std::vector<int32_t>> KvCache::Impl::selected(int32_t layer, const Step& step,
                                                          const at::Tensor& q) {
  std::vector<std::vector<int32_t>> lasts;
  for (size_t s = 0; s < step.slots.size(); ++s) {
    const int32_t slot = step.slots[s];
    Queries queries;
    queries.slot = slot;
    queries.layer = layer;
    queries.first_position = sequences[slot].length;
    queries.q = q.narrow(0, step.row_start[s], step.row_start[s + 1] - step.row_start[s]);
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      const StoredKeys keys = heads(slot, layer)[h].view();
      std::vector<uint8_t> read(keys.position.size(), 1);
      if (queries.q.size(0) > 0) policy->select(queries, h, keys, read);
      std::vector<int32_t> last(keys.last.begin(), keys.last.end());
      for (size_t j = 0; j < read.size(); ++j) {
        if (!read[j]) last[j] = -1;
      }
      lasts.push_back(std::move(last));
    }
  }
  return lasts;
}

void KvCache::Impl::evict(int32_t slot, int32_t layer, int32_t now) {
  for (HeadStore& head : heads(slot, layer)) {
    account(head, [&] { head.evict(now, policy->edits_stored(), evicted); });
  }
}

at::Tensor KvCache::Impl::attend_step(std::span<const StepList> lists, const StepRows& rows,
                                      double scale, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v) {
  const bool mass = policy->wants_mass();
  if (shape.device.is_cpu() || mass || policy->selects()) {
    return storage->attend(lists, rows, q, scale, mass);
  }
  const auto heads_of = [&](size_t s) { return lists.subspan(s * shape.kv_heads, shape.kv_heads); };
  const size_t sequences_here = rows.start.size() - 1;
  std::vector<size_t> prompts;
  std::vector<int32_t> start = {0}, position;
  std::vector<StepList> other_lists;
  std::vector<at::Tensor> other_q;
  for (size_t s = 0; s < sequences_here; ++s) {
    const int32_t first = rows.start[s], count = rows.start[s + 1] - first;
    if (count >= kPromptRows && rows.position[first] == 0) {
      prompts.push_back(s);
      continue;
    }
    start.push_back(start.back() + count);
    position.insert(position.end(), rows.position.begin() + first,
                    rows.position.begin() + first + count);
    other_lists.insert(other_lists.end(), heads_of(s).begin(), heads_of(s).end());
    other_q.push_back(q.narrow(0, first, count));
  }
  if (prompts.empty()) return storage->attend(lists, rows, q, scale, mass);

  at::Tensor out = at::empty_like(q);
  for (const size_t s : prompts) {
    const int32_t first = rows.start[s], count = rows.start[s + 1] - first;
    std::vector<std::span<const int32_t>> last;
    for (const StepList& list : heads_of(s)) last.emplace_back(list.head->last());
    out.narrow(0, first, count)
        .copy_(attend_prompt(q.narrow(0, first, count), k.narrow(0, first, count),
                             v.narrow(0, first, count), last, scale));
  }
  if (other_lists.empty()) return out;
  const at::Tensor other_out =
      storage->attend(other_lists, {start, position}, at::cat(other_q), scale, mass);
  int64_t from = 0;
  for (size_t s = 0; s < sequences_here; ++s) {
    if (std::ranges::binary_search(prompts, s)) continue;
    const int32_t count = rows.start[s + 1] - rows.start[s];
    out.narrow(0, rows.start[s], count).copy_(other_out.narrow(0, from, count));
    from += count;
  }
  return out;
}

at::Tensor KvCache::Impl::attend(int32_t layer, const Step& step, const LayerInput& input) {
  check_step(layer, step, input);
  const c10::AutoGradMode no_gradient(false);
  const bool renumbers = policy->renumbers();
  std::vector<int32_t> row_position(step.row_start.back());
  for (size_t s = 0; s < step.slots.size(); ++s) {
    std::iota(row_position.begin() + step.row_start[s],
              row_position.begin() + step.row_start[s + 1], sequences[step.slots[s]].length);
  }
  const at::Tensor positions =
      at::from_blob(row_position.data(), {std::ssize(row_position)}, at::kInt).clone();
  const auto prepared = [&](const at::Tensor& x, bool rotate) {
    return (rotate && input.rotate ? input.rotate(x, positions) : x).to(shape.dtype).contiguous();
  };
  const at::Tensor q = prepared(input.q, !renumbers), k = prepared(input.k, !renumbers);
  const at::Tensor v = prepared(input.v, false);

  std::vector<StepList> lists;
  for (size_t s = 0; s < step.slots.size(); ++s) {
    const int32_t slot = step.slots[s], rows = step.row_start[s + 1] - step.row_start[s];
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      HeadStore& head = heads(slot, layer)[h];
      lists.push_back({&head, slot, layer, h, head.count(), {}});
    }
    if (rows > 0) append(layer, slot, step.row_start[s], rows, input, k, v);
  }
  const StepRows rows{step.row_start, row_position};
  storage->store(lists, rows, k, v);
  raise_to(peak, usage());
  keep_queries(layer, step, q);

  std::vector<std::vector<int32_t>> lasts;
  if (policy->selects()) lasts = selected(layer, step, q);
  for (size_t i = 0; i < lasts.size(); ++i) lists[i].selected = lasts[i];
  const at::Tensor out = renumbers ? attend_renumbered(*policy, *storage, input, lists, rows, q)
                                   : attend_step(lists, rows, input.scale, q, k, v);

  for (size_t s = 0; s < step.slots.size(); ++s) {
    const int32_t slot = step.slots[s], fresh = step.row_start[s + 1] - step.row_start[s];
    if (fresh == 0) continue;
    const int32_t now = sequences[slot].length + fresh;
    std::vector<StoredKeys> after = stored(slot, layer);
    policy->after_step(slot, layer, now, after);
    evict(slot, layer, now);
  }
  give_back();
  next_layer = layer + 1 == shape.layers ? 0 : layer + 1;
  return out.to(input.q.scalar_type());
}

KvCache::KvCache(const Shape& shape, std::unique_ptr<Policy> policy,
                 std::pmr::memory_resource* memory) {
  check_shape(shape);
  NATSLM_CHECK(policy, "cache: a policy is needed; \"full\" evicts nothing");
  impl_ = std::make_unique<Impl>(shape, std::move(policy), memory);
}
KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;

int32_t KvCache::add_sequence() {
  std::vector<Sequence>& all = impl_->sequences;
  auto free = std::ranges::find(all, false, &Sequence::in_use);
  if (free == all.end()) free = all.insert(all.end(), Sequence());
  free->in_use = true;
  free->heads.resize(size_t(impl_->shape.layers) * impl_->shape.kv_heads);
  free->recent_queries.resize(impl_->shape.layers);
  return static_cast<int32_t>(free - all.begin());
}

void KvCache::remove_sequence(int32_t slot) {
  Sequence& sequence = impl_->sequence(slot);
  for (HeadStore& head : sequence.heads) {
    impl_->account(head, [&] { head.clear(impl_->evicted); });
  }
  impl_->give_back();
  impl_->storage->forget(slot);
  sequence = Sequence();
  impl_->policy->reset(slot);
  impl_->next_layer = 0;  // if a step failed half-way, its sequences are removed and all is well
}

int32_t KvCache::length(int32_t slot) const {
  return impl_->sequence(slot).length;
}

at::Tensor KvCache::attend(int32_t layer, const Step& step, const LayerInput& input) {
  return impl_->attend(layer, step, input);
}

void KvCache::finish_step(const Step& step) {
  NATSLM_CHECK(impl_->next_layer == 0, "cache: finish_step() after ", impl_->next_layer, " of ",
               impl_->shape.layers, " layers");
  for (size_t s = 0; s < step.slots.size(); ++s) {
    impl_->sequence(step.slots[s]).length += step.row_start[s + 1] - step.row_start[s];
  }
}

void KvCache::finish_prefill(int32_t slot) {
  Sequence& sequence = impl_->sequence(slot);
  for (int32_t layer = 0; layer < impl_->shape.layers; ++layer) {
    Queries recent;
    recent.slot = slot;
    recent.layer = layer;
    recent.q = sequence.recent_queries[layer];
    const int64_t kept = recent.q.defined() ? recent.q.size(0) : 0;
    recent.first_position = sequence.length - static_cast<int32_t>(kept);
    std::vector<StoredKeys> stored = impl_->stored(slot, layer);
    impl_->policy->on_prefill_end(recent, stored);
    impl_->evict(slot, layer, sequence.length);
    impl_->give_back();
  }
}

Usage KvCache::usage() const {
  return impl_->usage();
}

Usage KvCache::usage(int32_t slot) const {
  Usage usage;
  for (const HeadStore& head : impl_->sequence(slot).heads) {
    usage.live_keys += head.count();
    usage.held_bytes += std::ssize(head.pages()) * impl_->pool.key_bytes();
    usage.metadata_bytes += impl_->metadata_of(head);
  }
  usage.metadata_bytes += impl_->storage->table_bytes(slot);
  usage.live_bytes = usage.live_keys * impl_->key_bytes();
  return usage;
}

Usage KvCache::peak() const {
  return impl_->peak;
}
void KvCache::reset_peak() {
  impl_->peak = impl_->usage();
}

std::vector<std::vector<int32_t>> KvCache::live_per_head(int32_t slot) const {
  impl_->sequence(slot);
  std::vector<std::vector<int32_t>> live(impl_->shape.layers);
  for (int32_t layer = 0; layer < impl_->shape.layers; ++layer) {
    for (const HeadStore& head : impl_->heads(slot, layer)) live[layer].push_back(head.count());
  }
  return live;
}

std::vector<int32_t> KvCache::live_positions(int32_t slot, int32_t layer, int32_t head) const {
  impl_->sequence(slot);
  NATSLM_CHECK(
      layer >= 0 && layer < impl_->shape.layers && head >= 0 && head < impl_->shape.kv_heads,
      "cache: layer ", layer, ", KV head ", head, " is not among ", impl_->shape.layers,
      " layers of ", impl_->shape.kv_heads, " heads");
  std::vector<int32_t> positions = impl_->heads(slot, layer)[head].position();
  std::ranges::sort(positions);
  return positions;
}

const Shape& KvCache::shape() const {
  return impl_->shape;
}
const Policy& KvCache::policy() const {
  return *impl_->policy;
}

}  // namespace natslm::cache
