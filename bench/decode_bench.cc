// Decode attention over `layers` distinct caches, so that no cache level of the processor hides the
// bytes: one new token (or a chunk) of one sequence, 9 query and 3 KV heads of 64, with a share of
// the 16,384 positions alive against all of them. Both arms and a plain copy run interleaved in one
// loop.
//
//   decode_bench --benchmark_counters_tabular=true
//
// speedup: full / live. per_key: live time per live key over full time per key (1: time follows the
// live keys). GB/s: keys and values read; copy_GB/s: what memcpy reads on the same threads.
// SPDX-License-Identifier: Apache-2.0
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/base/parallel.h"
#include "natslm/kernels/attention_decode.h"
#include "natslm/ops/parallel.h"

namespace natslm {
namespace {

constexpr int kQHeads = 9, kKvHeads = 3, kHeadDim = 64, kLayers = 30;

// One stack of caches: `keys` live keys of `tokens` positions in every (layer, head).
class Caches {
 public:
  Caches(int keys, int tokens, DType dtype) {
    const int64_t page = kernels::page_bytes(kHeadDim, dtype);
    const int pages = (keys + kernels::kPageKeys - 1) / kernels::kPageKeys;
    for (int list = 0; list < kLayers * kKvHeads; ++list) {
      for (int i = 0; i < pages; ++i) {
        memory_.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(64, page)), std::free);
        if (dtype == DType::kFloat32) {
          auto* x = reinterpret_cast<float*>(memory_.back().get());
          for (int64_t e = 0; e < page / 4; ++e)
            x[e] = static_cast<float>((e * 37 + i) % 101) / 50 - 1;
        } else {
          auto* x = reinterpret_cast<BFloat16*>(memory_.back().get());
          for (int64_t e = 0; e < page / 2; ++e)
            x[e] = BFloat16(static_cast<float>((e * 37 + i) % 101) / 50 - 1);
        }
        pages_.push_back(memory_.back().get());
      }
      for (int j = 0; j < keys; ++j) {
        position_.push_back(static_cast<int32_t>(int64_t{j} * tokens / keys));
        last_.push_back(kForever);
      }
    }
    for (int list = 0; list < kLayers * kKvHeads; ++list) {
      kernels::CachedKeys one;
      one.pages = pages_.data() + int64_t{list} * pages;
      one.position = position_.data() + int64_t{list} * keys;
      one.last = last_.data() + int64_t{list} * keys;
      one.count = keys;
      lists_.push_back(one);
    }
    bytes_ = double(keys) * kHeadDim * 2 * size_of(dtype) * kKvHeads * kLayers;
  }
  const kernels::CachedKeys* layer(int i) const { return lists_.data() + int64_t{i} * kKvHeads; }
  double bytes() const { return bytes_; }

 private:
  std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> memory_;
  std::vector<const void*> pages_;
  std::vector<int32_t> position_, last_;
  std::vector<kernels::CachedKeys> lists_;
  double bytes_ = 0;
};

double seconds(const auto& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void decode(benchmark::State& state) {
  const int tokens = static_cast<int>(state.range(0)), rows = static_cast<int>(state.range(2));
  const int live = static_cast<int>(tokens * state.range(1) / 1000);
  const DType dtype = state.range(3) == 32 ? DType::kFloat32 : DType::kBFloat16;
  const Caches full(tokens, tokens, dtype), some(live, tokens, dtype);
  std::vector<uint8_t> q(int64_t{rows} * kQHeads * kHeadDim * 4, 1), out(q.size());
  std::vector<int32_t> row_start{0, rows}, position;
  for (int i = 0; i < rows; ++i) position.push_back(tokens + i);
  kernels::AttentionDecode p;
  p.batch = 1;
  p.q_heads = kQHeads;
  p.kv_heads = kKvHeads;
  p.head_dim = kHeadDim;
  p.rows = rows;
  p.scale = 0.125f;
  p.dtype = dtype;
  p.row_start = row_start.data();
  p.row_position = position.data();
  p.q = q.data();
  p.out = out.data();
  p.parallel = ops::torch_threads();
  const auto pass = [&](const Caches& caches) {
    for (int layer = 0; layer < kLayers; ++layer) {
      p.keys = caches.layer(layer);
      kernels::cpu::run(p);
    }
  };

  const int64_t copied = int64_t{256} << 20;
  std::vector<uint8_t> from(copied, 1), to(copied);
  const int parts = std::max(1, p.parallel.workers);
  std::vector<double> times[3];
  for (auto _ : state) {
    times[0].push_back(seconds([&] { pass(full); }));
    times[1].push_back(seconds([&] { pass(some); }));
    times[2].push_back(seconds([&] {
      p.parallel(parts, [&](int64_t part, int) {
        const int64_t size = copied / parts;
        std::memcpy(to.data() + part * size, from.data() + part * size, size);
      });
    }));
    state.SetIterationTime(times[1].back());
  }
  // The fastest of each: what the machine does when nothing else runs on it.
  const auto best = [](const std::vector<double>& x) { return *std::ranges::min_element(x); };
  const double of_full = best(times[0]), of_some = best(times[1]), of_copy = best(times[2]);
  state.counters["full_ms"] = of_full * 1e3;
  state.counters["live_ms"] = of_some * 1e3;
  state.counters["speedup"] = of_full / of_some;
  state.counters["per_key"] = of_some / of_full * tokens / live;
  state.counters["GB/s"] = some.bytes() / of_some * 1e-9;
  state.counters["full_GB/s"] = full.bytes() / of_full * 1e-9;
  state.counters["copy_GB/s"] = double(copied) / of_copy * 1e-9;
  state.counters["GFLOP/s"] = some.bytes() / size_of(dtype) / (2 * kHeadDim) * rows *
                              (kQHeads / kKvHeads) * 4 * kHeadDim / of_some * 1e-9;
}

BENCHMARK(decode)
    ->ArgNames({"tokens", "live_permille", "rows", "bits"})
    ->Args({16384, 120, 1, 32})
    ->Args({16384, 120, 1, 16})
    ->Args({16384, 240, 1, 32})
    ->Args({16384, 60, 1, 32})
    ->Args({16384, 120, 64, 32})
    ->Args({16384, 120, 64, 16})
    ->UseManualTime()
    ->Iterations(15)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace natslm

BENCHMARK_MAIN();
