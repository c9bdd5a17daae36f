// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/interrupt.h"

#include <signal.h>

#include <atomic>

#include "natslm/base/error.h"

namespace natslm::cli {

namespace {

std::atomic<bool> flag{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set from a signal handler");

constexpr int kSignals[] = {SIGINT, SIGTERM};

void set_flag(int) {
  flag.store(true, std::memory_order_relaxed);
}

}  // namespace

InterruptGuard::InterruptGuard() {
  struct sigaction action {};
  action.sa_handler = set_flag;
  // The second signal meets the default action: a program that hangs can still be ended.
  action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
  for (const int number : kSignals) sigaction(number, &action, nullptr);
}

InterruptGuard::~InterruptGuard() {
  for (const int number : kSignals) signal(number, SIG_DFL);
}

bool interrupted() {
  return flag.load(std::memory_order_relaxed);
}

void throw_if_interrupted() {
  NATSLM_CHECK(!interrupted(), "interrupted");
}

}  // namespace natslm::cli
