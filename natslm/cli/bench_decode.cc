// nats-lm bench decode: attention of one new token over the live keys of every layer, against the
// same kernel over all keys and, on a GPU, LibTorch's dense attention.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/device.h"
#include "natslm/cli/table.h"
#include "natslm/ops/decode.h"
#include "natslm/train/device.h"

namespace natslm::cli {

namespace {

using kernels::CachedKeys;
using kernels::GpuPage;
using kernels::kPageKeys;

struct Options {
  Workload work;  // all but what the list below replaces
  std::vector<int32_t> tokens = {16384};
  int32_t layers = 30;
  std::string device = "cpu";
};

// The keys that a query at the text's end can read under one row of lifetimes.
struct LiveKeys {
  std::vector<int32_t> position, last;
  LiveKeys(const int32_t* lasts, int32_t tokens) {
    for (int32_t j = 0; j < tokens; ++j) {
      if (!visible(tokens - 1, j, lasts[j])) continue;
      position.push_back(j);
      last.push_back(lasts[j]);
    }
  }
  int32_t count() const { return static_cast<int32_t>(position.size()); }
  int64_t pages() const { return (position.size() + kPageKeys - 1) / kPageKeys; }
};

// Row positions and starts of one new token for each sequence.
struct NewTokens {
  std::vector<int32_t> row_start, position;
  explicit NewTokens(const Workload& w) : position(w.batch, w.tokens - 1) {
    for (int32_t b = 0; b <= w.batch; ++b) row_start.push_back(b);
  }
};

double scale(const Workload& w) {
  return 1 / std::sqrt(double(w.head_dim));
}

// ------------------------------------------------------------------ CPU

// The cached keys of every layer: distinct memory for each, so that no level of the processor's
// caches holds what a token has to read.
class Layers {
 public:
  // Keeps the keys that a query at position tokens - 1 can read under `last` [layers * sets, T].
  Layers(const Workload& w, const at::Tensor& last) {
    const DType dtype = ops::dtype_of(scalar_type(w));
    const int64_t page = kernels::page_bytes(w.head_dim, dtype);
    const at::Tensor noise = at::randn({page / int64_t(size_of(dtype))}).to(scalar_type(w));
    rows_.reserve(last.size(0));
    for (int64_t row = 0; row < last.size(0); ++row) {
      Row& head = rows_.emplace_back(
          Row{{}, {}, LiveKeys(last.const_data_ptr<int32_t>() + row * w.tokens, w.tokens)});
      head.memory = at::empty({head.keys.pages() * page}, at::kByte);
      for (int64_t p = 0; p < head.keys.pages(); ++p) {
        head.pages.push_back(head.memory.mutable_data_ptr<uint8_t>() + p * page);
        std::memcpy(head.memory.mutable_data_ptr<uint8_t>() + p * page, noise.const_data_ptr(),
                    page);
      }
      keys_.push_back({.pages = head.pages.data(),
                       .position = head.keys.position.data(),
                       .last = head.keys.last.data(),
                       .mass = nullptr,
                       .count = head.keys.count()});
      live_ += head.keys.count();
      bytes_ += head.keys.pages() * page;
    }
  }
  std::span<const CachedKeys> of(int32_t layer, int32_t sets) const {
    return {keys_.data() + int64_t(layer) * sets, static_cast<size_t>(sets)};
  }
  int64_t live() const { return live_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Row {
    at::Tensor memory;
    std::vector<const void*> pages;
    LiveKeys keys;
  };
  std::vector<Row> rows_;
  std::vector<CachedKeys> keys_;
  int64_t live_ = 0, bytes_ = 0;
};

void run_on_cpu(const Options& o, Context& context) {
  const Workload& w = o.work;
  const int32_t sets = w.batch * w.kv_heads;
  const RandomRoles roles = draw_roles(w, int64_t{o.layers} * sets);
  const Layers live(w, roles.last);
  const Layers full(w, at::full_like(roles.last, kForever));

  const at::Tensor q = at::randn({w.batch, w.heads, w.head_dim}).to(scalar_type(w));
  const NewTokens rows(w);
  const auto token = [&](const Layers& layers) {
    for (int32_t layer = 0; layer < o.layers; ++layer) {
      ops::attend_pages(q, rows.row_start, rows.position, layers.of(layer, sets), w.kv_heads,
                        scale(w));
    }
  };
  BenchResult result;
  result.baseline = "full";
  result.times = compare([&] { token(live); }, [&] { token(full); }, w.repeat);
  const double group = double(w.heads) / w.kv_heads;
  result.live_pairs = double(live.live()) * group;
  result.causal_pairs = double(full.live()) * group;
  result.kv_end = roles.kv_end;
  result.flop_per_pair = 4.0 * w.head_dim;
  const auto rate = [](const Layers& layers, const Timing& time) {
    return double(layers.bytes()) / (time.median() * 1e6);  // GB/s
  };
  report(context, result,
         {{"tokens", w.tokens},
          {"kv_bytes", live.bytes()},
          {"baseline_kv_bytes", full.bytes()},
          {"gb_per_s", rate(live, result.times.ours)},
          {"baseline_gb_per_s", rate(full, result.times.baseline)}});
  std::printf("keys and values: %s of %s, read at %.1f (ours) and %.1f GB/s (full)\n",
              bytes(live.bytes()).c_str(), bytes(full.bytes()).c_str(),
              rate(live, result.times.ours), rate(full, result.times.baseline));
}

// ------------------------------------------------------------------ GPU

template <class T>
at::Tensor uploaded(const std::vector<T>& items, const c10::Device& device) {
  const auto bytes = static_cast<int64_t>(items.size() * sizeof(T));
  return at::from_blob(const_cast<T*>(items.data()), {bytes}, at::kByte)
      .to(device, at::kByte, /*non_blocking=*/false, /*copy=*/true);
}

// The same in a GPU's memory: random pages, distinct for every layer.
class GpuLayers {
 public:
  GpuLayers(const Workload& w, const at::Tensor& last, int32_t layers, const c10::Device& device)
      : layout_{w.head_dim} {
    const int64_t sets = last.size(0) / layers;
    for (int32_t layer = 0; layer < layers; ++layer) {
      std::vector<LiveKeys> lists;
      int64_t pages = 0;
      for (int64_t set = 0; set < sets; ++set) {
        const int64_t row = layer * sets + set;
        lists.emplace_back(last.const_data_ptr<int32_t>() + row * w.tokens, w.tokens);
        pages += lists.back().pages();
        most_ = std::max(most_, lists.back().count());
      }
      // Keys and values are bfloat16 noise; what follows them in a page is not.
      const int64_t ints = layout_.bytes() / int64_t{sizeof(int32_t)};
      Layer& here = layers_.emplace_back();
      here.memory =
          at::randn({pages, layout_.bytes() / 2}, at::TensorOptions(at::kBFloat16).device(device));
      const at::Tensor metadata = at::full({pages, 2 * kPageKeys}, -1, at::kInt);
      std::vector<const void*> table;
      std::vector<CachedKeys> all;
      auto* base = static_cast<uint8_t*>(here.memory.mutable_data_ptr());
      for (const LiveKeys& list : lists) {
        for (int32_t j = 0; j < list.count(); ++j) {
          int32_t* of_page = metadata.mutable_data_ptr<int32_t>() +
                             (int64_t(table.size()) + j / kPageKeys) * 2 * kPageKeys;
          of_page[j % kPageKeys] = list.position[j];
          of_page[kPageKeys + j % kPageKeys] = list.last[j];
        }
        for (int64_t p = 0; p < list.pages(); ++p) {
          table.push_back(base + int64_t(table.size()) * layout_.bytes());
        }
      }
      here.memory.view(at::kInt).narrow(1, ints - 2 * kPageKeys, 2 * kPageKeys).copy_(metadata);
      here.table = uploaded(table, device);
      const auto* first = static_cast<const void* const*>(here.table.const_data_ptr());
      for (const LiveKeys& list : lists) {
        here.live += list.count();
        CachedKeys keys;
        keys.pages = first;
        keys.count = list.count();
        all.push_back(keys);
        first += list.pages();
      }
      here.keys = uploaded(all, device);
      here.bytes = pages * kernels::page_bytes(w.head_dim, DType::kBFloat16);
    }
  }

  ops::DeviceLists of(int32_t layer) const {
    ops::DeviceLists lists;
    lists.keys = static_cast<const CachedKeys*>(layers_[layer].keys.const_data_ptr());
    lists.max_count = most_;
    return lists;
  }
  // Keys, and bytes of them and their values, of a model of `layers` layers that take these in
  // turn.
  int64_t live(int32_t layers) const { return sum(layers, &Layer::live); }
  int64_t bytes(int32_t layers) const { return sum(layers, &Layer::bytes); }

 private:
  struct Layer {
    at::Tensor memory, table, keys;
    int64_t live = 0, bytes = 0;
  };
  int64_t sum(int32_t layers, int64_t Layer::*what) const {
    int64_t all = 0;
    for (int32_t layer = 0; layer < layers; ++layer) all += layers_[layer % layers_.size()].*what;
    return all;
  }
  GpuPage layout_;
  std::vector<Layer> layers_;
  int32_t most_ = 0;
};

// How many of the layers have keys of their own: as many as fit into the GPU's memory, where all
// keys lie three times (alive, all, LibTorch's), and as many as roles are drawn for in seconds. The
// others take them again: two layers of such a length are already more than the caches hold.
int32_t distinct_layers(const Options& o) {
  constexpr double kDrawnKeys = 64e6, kOfMemory = 0.75;
  const Workload& w = o.work;
  const double keys = double(w.batch) * w.kv_heads * w.tokens;
  const double bytes = 3 * keys * (4.0 * w.head_dim + double(GpuPage::kMetadataBytes) / kPageKeys);
  const double fit = std::min(kOfMemory * double(gpu_facts().memory) / bytes, kDrawnKeys / keys);
  return static_cast<int32_t>(std::clamp(fit, 1.0, double(o.layers)));
}

void run_on_gpu(const Options& o, const c10::Device& device, Context& context) {
  const Workload& w = o.work;
  NATSLM_CHECK(w.dtype == "bfloat16", "--dtype ", w.dtype,
               ": on a GPU keys are stored as bfloat16; give --dtype bfloat16");
  const int32_t sets = w.batch * w.kv_heads;
  const int32_t distinct = distinct_layers(o);
  const RandomRoles roles = draw_roles(w, int64_t{distinct} * sets);
  const GpuLayers live(w, roles.last, distinct, device);
  const GpuLayers full(w, at::full_like(roles.last, kForever), distinct, device);
  const auto options = at::TensorOptions(at::kBFloat16).device(device);
  const at::Tensor q = at::randn({w.batch, w.heads, w.head_dim}, options);
  std::vector<at::Tensor> dense_k, dense_v;
  for (int32_t layer = 0; layer < distinct; ++layer) {
    for (auto* into : {&dense_k, &dense_v}) {
      into->push_back(at::randn({w.batch, w.kv_heads, w.tokens, w.head_dim}, options));
    }
  }
  const NewTokens rows(w);
  const at::Tensor row_start = uploaded(rows.row_start, device),
                   position = uploaded(rows.position, device);
  const auto paged = [&](const GpuLayers& layers, int32_t layer) {
    ops::DeviceLists lists = layers.of(layer);
    lists.row_start = static_cast<const int32_t*>(row_start.const_data_ptr());
    lists.row_position = static_cast<const int32_t*>(position.const_data_ptr());
    return ops::attend_pages(q, rows.row_start, lists, w.kv_heads, scale(w));
  };
  const auto dense = [&](int32_t layer) {
    return at::scaled_dot_product_attention(q.unsqueeze(2), dense_k[layer], dense_v[layer], {}, 0.0,
                                            false, scale(w), w.heads != w.kv_heads);
  };
  struct Side {
    std::string name;
    std::function<at::Tensor(int32_t)> layer;
    int64_t keys, bytes;
  };
  const int64_t dense_keys = int64_t{o.layers} * sets * w.tokens;
  const std::vector<Side> sides = {{"live", [&](int32_t layer) { return paged(live, layer); },
                                    live.live(o.layers), live.bytes(o.layers)},
                                   {"full", [&](int32_t layer) { return paged(full, layer); },
                                    full.live(o.layers), full.bytes(o.layers)},
                                   {"LibTorch", dense, dense_keys, dense_keys * 4 * w.head_dim}};

  // A token, launched kernel by kernel and as a graph.
  const c10::impl::VirtualGuardImpl streams(device.type());
  const c10::StreamGuard guard(streams.getStreamFromGlobalPool(device));
  std::vector<std::unique_ptr<train::LaunchGraph>> graphs;
  std::vector<std::function<void()>> calls;
  for (const Side& side : sides) {
    const auto token = [&side, &o, distinct] {
      for (int32_t layer = 0; layer < o.layers; ++layer) side.layer(layer % distinct);
    };
    NATSLM_CHECK(at::isfinite(side.layer(0)).all().item<bool>(), side.name,
                 " computes what is not finite");
    token();
    graphs.push_back(train::record_launches(token));
    calls.push_back([graph = graphs.back().get()] { graph->replay(); });
    calls.push_back(token);
  }
  const std::vector<Timing> times = time_in_turn(calls, w.repeat, device);

  // What reading the bytes once at 4.3 TB/s and 0.25 ms for everything else comes to.
  const auto bar = [](int64_t bytes) { return 1.15 * double(bytes) / 4.3e9 + 0.25; };
  Table table(
      {"", "ms a token, graph", "spread", "launches", "keys and values", "GB/s", "bar, ms"});
  nlohmann::ordered_json results = {{"tokens", w.tokens},
                                    {"layers", o.layers},
                                    {"distinct_layers", distinct},
                                    {"kv_end", roles.kv_end}};
  for (size_t i = 0; i < sides.size(); ++i) {
    const Timing &graph = times[2 * i], &launched = times[2 * i + 1];
    const double rate = double(sides[i].bytes) / (graph.median() * 1e6);
    table.add({sides[i].name, fixed(graph.median(), 4), percent(graph.spread()),
               fixed(launched.median(), 4), bytes(sides[i].bytes), fixed(rate, 0),
               fixed(bar(sides[i].bytes), 4)});
    results[sides[i].name] = {{"graph_ms", graph.median()},   {"launched_ms", launched.median()},
                              {"spread", graph.spread()},     {"keys", sides[i].keys},
                              {"kv_bytes", sides[i].bytes},   {"gb_per_s", rate},
                              {"bar_ms", bar(sides[i].bytes)}};
  }
  std::printf("%d tokens, %d layers", w.tokens, o.layers);
  if (distinct < o.layers) std::printf(" that take the keys of %d in turn", distinct);
  std::printf(":\n%s", table.text().c_str());
  std::printf(
      "%s of the keys alive: %.2fx as fast as the same kernel over all, %.2fx as LibTorch\n",
      percent(roles.kv_end).c_str(), times[2].median() / times[0].median(),
      times[4].median() / times[0].median());
  context.write_json(results);
}

void run(Options o, Context& context) {
  const c10::Device device = device_from(o.device);
  context.measured_on(device);
  for (const int32_t tokens : o.tokens) {
    o.work.tokens = tokens;
    check(o.work);
    device.is_cpu() ? run_on_cpu(o, context) : run_on_gpu(o, device, context);
  }
}

}  // namespace

void add_bench_decode(CLI::App& bench, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(
      bench, "decode", "attention of one new token in every layer against all keys alive",
      [o, &context] { run(*o, context); });
  add_workload_options(command, o->work);
  command.remove_option(command.get_option("--tokens"));
  command
      .add_option("--tokens", o->tokens, "lengths of the sequences, tokens, one after the other")
      ->check(CLI::Range(1, 1 << 22));
  add_device_option(command, o->device);
  command.add_option("--layers", o->layers, "layers, each with its own keys and values")
      ->check(CLI::Range(1, 1024));
}

}  // namespace natslm::cli
