// Progress of a long run on standard error: a bar with the time left, redrawn in place, on a
// terminal; otherwise a plain line every few seconds, so that logs stay readable.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

#include "natslm/cli/terminal.h"

namespace natslm::cli {

class Progress {
 public:
  // `total` is the number of units (steps, tokens) to come; 0: not known, no bar and no time left.
  Progress(std::string label, int64_t total, std::FILE* stream = stderr,
           const Terminal& terminal = terminal_of(2));
  // Leaves the bar's last state on its line.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `done` counts from the run's beginning; `start` of a resumed run is told once with
  // restart_at(). `note` is shown behind the bar: "loss 3.21  KV 12.3 %". Cheap: draws a few times
  // a second at most.
  void update(int64_t done, std::string_view note = {});
  // Work that was done before this run: it counts as done but not for the speed.
  void restart_at(int64_t done);
  // A whole line that stays, above the bar.
  void print(std::string_view line);

 private:
  using Clock = std::chrono::steady_clock;
  void draw(bool last);
  void clear_line();

  std::string label_;
  int64_t total_ = 0;
  int64_t done_ = 0;
  int64_t first_ = 0;
  std::string note_;
  std::FILE* stream_;
  Terminal terminal_;
  Clock::time_point begin_ = Clock::now();
  Clock::time_point drawn_{};
  bool visible_ = false;  // a bar is on the current line
  bool pending_ = false;  // updates were made since the last drawing
};

}  // namespace natslm::cli
