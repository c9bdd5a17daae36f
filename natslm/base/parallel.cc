// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace natslm {

ParallelFor plain_threads(int threads) {
  if (threads <= 1) return serial();
  const auto run = [threads](int64_t tasks, const ParallelFor::Body& body) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    const auto work = [&](int worker) {
      try {
        for (int64_t task = next++; task < tasks; task = next++) body(task, worker);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next = tasks;
      }
    };
    std::vector<std::jthread> helpers;
    for (int worker = 1; worker < threads; ++worker) helpers.emplace_back(work, worker);
    work(0);
    helpers.clear();  // joins
    if (error) std::rethrow_exception(error);
  };
  return {threads, run};
}

}  // namespace natslm
