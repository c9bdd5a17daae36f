// The one table of evaluations. `nats-lm eval` has a command for each; a new one is a file here, a
// line in tasks.cc and its command.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string_view>

namespace natslm::eval {

struct Task {
  std::string_view name;     // of the command: "ppl"
  std::string_view summary;  // what it measures, in a line
};

std::span<const Task> tasks();

// Throws Error listing what there is.
const Task& task(std::string_view name);

}  // namespace natslm::eval
