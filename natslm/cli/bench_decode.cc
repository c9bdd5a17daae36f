// nats-lm bench decode: attention of one new token over the live keys of every layer, against the
// same kernel over all keys. SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/randn.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/cli/bench.h"
#include "natslm/cli/table.h"
#include "natslm/ops/decode.h"

namespace natslm::cli {

namespace {

struct Options {
  Workload work = {.tokens = 16384};
  int32_t layers = 30;
};

// The cached keys of every layer: distinct memory for each, so that no level of the processor's
// caches holds what a token has to read.
class Layers {
 public:
  // Keeps the keys that a query at position tokens - 1 can read under `last` [layers * sets, T].
  Layers(const Workload& w, const at::Tensor& last) : rows_(last.size(0)) {
    const DType dtype = ops::dtype_of(scalar_type(w));
    const int64_t page = kernels::page_bytes(w.head_dim, dtype);
    const at::Tensor noise = at::randn({page / int64_t(size_of(dtype))}).to(scalar_type(w));
    for (size_t row = 0; row < rows_.size(); ++row) {
      Row& head = rows_[row];
      const int32_t* lasts = last.const_data_ptr<int32_t>() + int64_t(row) * w.tokens;
      for (int32_t j = 0; j < w.tokens; ++j) {
        if (!visible(w.tokens - 1, j, lasts[j])) continue;
        head.position.push_back(j);
        head.last.push_back(lasts[j]);
      }
      const int64_t pages =
          (int64_t(head.position.size()) + kernels::kPageKeys - 1) / kernels::kPageKeys;
      head.memory = at::empty({pages * page}, at::kByte);
      for (int64_t p = 0; p < pages; ++p) {
        head.pages.push_back(head.memory.mutable_data_ptr<uint8_t>() + p * page);
        std::memcpy(head.memory.mutable_data_ptr<uint8_t>() + p * page, noise.const_data_ptr(),
                    page);
      }
      keys_.push_back({.pages = head.pages.data(),
                       .position = head.position.data(),
                       .last = head.last.data(),
                       .mass = nullptr,
                       .count = static_cast<int32_t>(head.position.size())});
      live_ += int64_t(head.position.size());
      bytes_ += pages * page;
    }
  }
  std::span<const kernels::CachedKeys> of(int32_t layer, int32_t sets) const {
    return {keys_.data() + int64_t(layer) * sets, static_cast<size_t>(sets)};
  }
  int64_t live() const { return live_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Row {
    at::Tensor memory;
    std::vector<const void*> pages;
    std::vector<int32_t> position, last;
  };
  std::vector<Row> rows_;
  std::vector<kernels::CachedKeys> keys_;
  int64_t live_ = 0, bytes_ = 0;
};

void run(const Options& o, Context& context) {
  check(o.work);
  const Workload& w = o.work;
  const int32_t sets = w.batch * w.kv_heads;
  const RandomRoles roles = draw_roles(w, int64_t{o.layers} * sets);
  const Layers live(w, roles.last);
  const Layers full(w, at::full_like(roles.last, kForever));

  const at::Tensor q = at::randn({w.batch, w.heads, w.head_dim}).to(scalar_type(w));
  std::vector<int32_t> row_start, positions(w.batch, w.tokens - 1);
  for (int32_t b = 0; b <= w.batch; ++b) row_start.push_back(b);
  const auto token = [&](const Layers& layers) {
    for (int32_t layer = 0; layer < o.layers; ++layer) {
      ops::attend_pages(q, row_start, positions, layers.of(layer, sets), w.kv_heads,
                        1 / std::sqrt(double(w.head_dim)));
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
         {{"kv_bytes", live.bytes()},
          {"baseline_kv_bytes", full.bytes()},
          {"gb_per_s", rate(live, result.times.ours)},
          {"baseline_gb_per_s", rate(full, result.times.baseline)}});
  std::printf("keys and values: %s of %s, read at %.1f (ours) and %.1f GB/s (full)\n",
              bytes(live.bytes()).c_str(), bytes(full.bytes()).c_str(),
              rate(live, result.times.ours), rate(full, result.times.baseline));
}

}  // namespace

void add_bench_decode(CLI::App& bench, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command = context.add(
      bench, "decode", "attention of one new token in every layer against all keys alive",
      [o, &context] { run(*o, context); });
  add_workload_options(command, o->work);
  command.add_option("--layers", o->layers, "layers, each with its own keys and values")
      ->check(CLI::Range(1, 1024));
}

}  // namespace natslm::cli
