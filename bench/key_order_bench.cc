// What comes before attention on a GPU: from score logits to roles, lifetimes and key order, and
// from there to gathered keys, runs and the work list. Needs no LibTorch to run.
//
//   key_order_bench --benchmark_counters_tabular=true
//
// Arguments: tokens, KV heads, sequences, role chunk or tile. Times are of the GPU: twenty calls
// are recorded as one graph, so that the host's launches do not count. The roles are drawn with the
// share of Globals and Locals that the attention benchmarks use. GB/s: bytes that a call must read
// and write at least once.
// SPDX-License-Identifier: Apache-2.0
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/sorted_keys.h"
#include "natslm/roles/assignment.h"
#include "natslm/roles/lifetimes.h"

namespace natslm::bench {
namespace {

template <class T>
class OnDevice {
 public:
  explicit OnDevice(int64_t count) {
    void* memory = nullptr;
    NATSLM_CUDA(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)));
    data_ = static_cast<T*>(memory);
  }
  explicit OnDevice(const std::vector<T>& from) : OnDevice(static_cast<int64_t>(from.size())) {
    NATSLM_CUDA(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Records calls of `body` as a graph and times its replays, call by call.
void time_on_device(benchmark::State& state, const std::function<void(CUstream_st*)>& body) {
  constexpr int kCalls = 20;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t start, stop;
  NATSLM_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  NATSLM_CUDA(cudaEventCreate(&start));
  NATSLM_CUDA(cudaEventCreate(&stop));
  NATSLM_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) body(stream);
  NATSLM_CUDA(cudaStreamEndCapture(stream, &graph));
  NATSLM_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  NATSLM_CUDA(cudaGraphLaunch(replay, stream));
  NATSLM_CUDA(cudaStreamSynchronize(stream));
  for (auto _ : state) {
    NATSLM_CUDA(cudaEventRecord(start, stream));
    NATSLM_CUDA(cudaGraphLaunch(replay, stream));
    NATSLM_CUDA(cudaEventRecord(stop, stream));
    NATSLM_CUDA(cudaStreamSynchronize(stream));
    float milliseconds = 0;
    NATSLM_CUDA(cudaEventElapsedTime(&milliseconds, start, stop));
    state.SetIterationTime(milliseconds * 1e-3 / kCalls);
  }
  NATSLM_CUDA(cudaGraphExecDestroy(replay));
  NATSLM_CUDA(cudaGraphDestroy(graph));
  NATSLM_CUDA(cudaEventDestroy(start));
  NATSLM_CUDA(cudaEventDestroy(stop));
  NATSLM_CUDA(cudaStreamDestroy(stream));
}

void count_bytes(benchmark::State& state, double bytes) {
  state.counters["GB/s"] =
      benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

struct Shape {
  int32_t tokens, kv_heads, batch;
  int64_t rows() const { return int64_t{batch} * kv_heads; }
  int64_t keys() const { return rows() * tokens; }
};
Shape shape_of(const benchmark::State& state) {
  return {static_cast<int32_t>(state.range(0)), static_cast<int32_t>(state.range(1)),
          static_cast<int32_t>(state.range(2))};
}

// Memory of one assignment with 11 % Globals, 3 % Locals and a window of 256.
struct Roles {
  Roles(const Shape& s, int32_t chunk)
      : logits(logits_of_shares(s)),
        bytes_out(s.keys()),
        words_out(s.keys() * 4),
        floats_out(s.keys() * 2 * roles::kRoles),
        shares(s.rows() * roles::kShares),
        order(s.keys()),
        ends(s.rows() * kernels::KeyOrder::kSegments) {
    p.batch = s.batch;
    p.kv_heads = s.kv_heads;
    p.tokens = s.tokens;
    p.options = {.window = 256, .chunk = chunk};
    p.logits = logits.data();
    p.logits_token_stride = roles::kRoles * int64_t{s.kv_heads};
    p.logits_batch_stride = s.tokens * p.logits_token_stride;
    p.sample = true;
    p.roles = bytes_out.data();
    p.last = words_out.data();
    p.horizons = words_out.data() + s.keys();
    p.onehot = floats_out.data();
    p.soft = floats_out.data() + s.keys() * roles::kRoles;
    p.shares = shares.data();
    p.order = order.data();
    p.ends = ends.data();
    workspace = std::make_unique<OnDevice<char>>(roles::cuda::workspace_bytes(p));
    p.workspace = workspace->data();
  }
  void draw() const {
    roles::cuda::assign(p, nullptr);
    NATSLM_CUDA(cudaDeviceSynchronize());
  }
  // Gumbel noise on logarithms of shares draws roles in these shares.
  static std::vector<float> logits_of_shares(const Shape& s) {
    const float share[roles::kRoles] = {std::log(0.11f), std::log(0.03f), std::log(0.86f)};
    std::vector<float> x(s.keys() * roles::kRoles);
    for (size_t i = 0; i < x.size(); ++i) x[i] = share[i % roles::kRoles];
    return x;
  }

  OnDevice<float> logits;
  OnDevice<int8_t> bytes_out;
  OnDevice<int32_t> words_out;
  OnDevice<float> floats_out, shares;
  OnDevice<int32_t> order, ends;
  std::unique_ptr<OnDevice<char>> workspace;
  roles::Assignment p;
};

bool skip(benchmark::State& state) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return false;
  state.SkipWithError("there is no CUDA device");
  return true;
}

void time_assignment(benchmark::State& state, bool sample) {
  if (skip(state)) return;
  const Shape s = shape_of(state);
  Roles r(s, static_cast<int32_t>(state.range(3)));
  r.p.sample = sample;
  time_on_device(state, [&](CUstream_st* stream) { roles::cuda::assign(r.p, stream); });
  // Logits; roles, last, three horizons, one-hot, order; soft.
  count_bytes(state,
              static_cast<double>(s.keys()) * (12 + 1 + 4 + 12 + 12 + 4 + (sample ? 12 : 0)));
}
void assign(benchmark::State& state) {
  time_assignment(state, true);
}
// Without noise, as where nothing is trained. The logits are the same for all tokens: no Globals.
void assign_argmax(benchmark::State& state) {
  time_assignment(state, false);
}

void assign_backward(benchmark::State& state) {
  if (skip(state)) return;
  const Shape s = shape_of(state);
  const Roles r(s, static_cast<int32_t>(state.range(3)));
  r.draw();
  const OnDevice<float> dlogits(s.keys() * roles::kRoles);
  roles::AssignmentGradient g;
  g.batch = s.batch;
  g.kv_heads = s.kv_heads;
  g.tokens = s.tokens;
  g.chunk = r.p.options.chunk;
  g.horizons = r.p.horizons;
  g.soft = r.p.soft;
  g.donehot = r.p.onehot;
  g.batch_stride = int64_t{s.kv_heads} * s.tokens * roles::kRoles;
  g.head_stride = int64_t{s.tokens} * roles::kRoles;
  g.token_stride = roles::kRoles;
  g.role_stride = 1;
  g.dprice = 1;
  g.dlogits = dlogits.data();
  time_on_device(state, [&](CUstream_st* stream) { roles::cuda::assign_backward(g, stream); });
  count_bytes(state, static_cast<double>(s.keys()) * (12 + 12 + 12 + 12));
}

// The argument after the sequences is the number of queries of a tile.
void sort_keys(benchmark::State& state) {
  if (skip(state)) return;
  const Shape s = shape_of(state);
  const Roles r(s, 1);
  r.draw();
  const kernels::cuda::PlanShape plan = {s.batch, s.kv_heads, s.tokens, 128,
                                         static_cast<int32_t>(state.range(3))};
  const int64_t row = plan.head_dim, head = s.tokens * row;
  const kernels::Strides stride = {s.kv_heads * head, head, row};
  std::vector<uint16_t> numbers(s.keys() * row);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(mix64(i));
  const OnDevice<uint16_t> k(numbers), v(numbers);
  const OnDevice<char> workspace(kernels::cuda::sorted_keys_bytes(plan));
  const auto to = kernels::cuda::sorted_keys_in(workspace.data(), plan);
  const kernels::KeyOrder order = {r.p.order, r.p.ends, roles::key_reach(r.p.options)};
  time_on_device(state, [&](CUstream_st* stream) {
    kernels::cuda::launch_sort_keys(plan, k.data(), stride, v.data(), stride, r.p.last, nullptr,
                                    order, to, stream);
  });
  count_bytes(state, static_cast<double>(s.keys()) * (4.0 * 2 * row + 16));
}

// The same plan without a gather: bounds of position order.
void position_bounds(benchmark::State& state) {
  if (skip(state)) return;
  const Shape s = shape_of(state);
  const Roles r(s, 1);
  r.draw();
  const kernels::cuda::PlanShape plan = {s.batch, s.kv_heads, s.tokens, 128,
                                         static_cast<int32_t>(state.range(3))};
  const OnDevice<char> workspace(kernels::cuda::position_bounds_bytes(plan));
  const auto to = kernels::cuda::position_bounds_in(workspace.data(), plan);
  time_on_device(state, [&](CUstream_st* stream) {
    kernels::cuda::launch_position_bounds(plan, r.p.last, nullptr, to, stream);
  });
  count_bytes(state, static_cast<double>(s.keys()) * 4);
}

void roles_arguments(benchmark::internal::Benchmark* b) {
  b->UseManualTime()->Unit(benchmark::kMicrosecond);
  b->ArgNames({"T", "Hkv", "B", "chunk"});
  for (const int64_t tokens : {1024, 4096, 16384, 65536, 131072}) b->Args({tokens, 8, 1, 1});
  b->Args({65536, 8, 1, 16});
  b->Args({1024, 12, 32, 1});
}
void tile_arguments(benchmark::internal::Benchmark* b) {
  b->UseManualTime()->Unit(benchmark::kMicrosecond);
  b->ArgNames({"T", "Hkv", "B", "tile"});
  for (const int64_t tokens : {4096, 16384, 65536, 131072}) b->Args({tokens, 8, 1, 32});
  b->Args({1024, 12, 32, 128});
}
BENCHMARK(assign)->Apply(roles_arguments);
BENCHMARK(assign_argmax)->Apply(roles_arguments);
BENCHMARK(assign_backward)->Apply(roles_arguments);
BENCHMARK(sort_keys)->Apply(tile_arguments);
BENCHMARK(position_bounds)->Apply(tile_arguments);

}  // namespace
}  // namespace natslm::bench

BENCHMARK_MAIN();
