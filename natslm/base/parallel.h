// How a Torch-free kernel uses threads: it is handed a ParallelFor and never makes a pool of its
// own. ops/ fills it with LibTorch's pool, tests and benchmarks with the small one below.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

namespace natslm {

struct ParallelFor {
  // body(task, worker), worker in [0, workers).
  using Body = std::function<void(int64_t task, int worker)>;

  // Upper bound of the worker numbers handed out: size per-worker scratch with it.
  int workers = 1;
  // Calls the body once for every task in [0, tasks), in any order, from up to `workers` threads,
  // tasks handed out one by one (so uneven ones balance), and returns when all are done. An
  // exception of a body is rethrown here. Empty means: run in the calling thread.
  std::function<void(int64_t tasks, const Body& body)> run;

  void operator()(int64_t tasks, const Body& body) const {
    if (run) return run(tasks, body);
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
  }
};

// Runs everything in the calling thread.
inline ParallelFor serial() {
  return {};
}

// Starts `threads` - 1 threads for each call: for tests and benchmarks without LibTorch.
ParallelFor plain_threads(int threads);

}  // namespace natslm
