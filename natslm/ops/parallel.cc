// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

// Without this flag at::parallel_for is compiled as a plain loop, silently.
#ifndef _OPENMP
#error "natslm/ops/parallel.cc must be compiled with OpenMP, LibTorch's own thread pool"
#endif

namespace natslm::ops {

ParallelFor torch_threads() {
  const int threads = at::get_num_threads();
  const auto run = [threads](int64_t tasks, const ParallelFor::Body& body) {
    std::atomic<int64_t> next{0};
    const int64_t workers = std::min<int64_t>(threads, tasks);
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t task = next++; task < tasks; task = next++) {
          body(task, static_cast<int>(worker));
        }
      }
    });
  };
  return {threads, run};
}

}  // namespace natslm::ops
