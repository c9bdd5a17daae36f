// Ctrl-C and the terminate signal as a flag that long loops ask about, so that they can stop
// between two steps with everything whole. A second Ctrl-C ends the program at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace natslm::cli {

// While one of these lives, the signals set the flag instead of ending the program. One at a time.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
};

// True once a signal came while a guard was alive.
bool interrupted();

// Throws Error("interrupted") then; for loops that have nothing to save.
void throw_if_interrupted();

}  // namespace natslm::cli
