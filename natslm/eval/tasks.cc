// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/tasks.h"

#include <algorithm>
#include <vector>

#include "natslm/base/error.h"

namespace natslm::eval {
namespace {

constexpr Task kTasks[] = {
    {"ppl", "perplexity of text through the evicting cache, for one policy or several"},
    {"repeat", "perplexity of a passage that the text asks to be repeated, through the same cache"},
    {"facts", "share of facts recalled that were planted in a long text, through the same cache"},
};

}  // namespace

std::span<const Task> tasks() {
  return kTasks;
}

const Task& task(std::string_view name) {
  const auto found = std::ranges::find(kTasks, name, &Task::name);
  if (found != std::end(kTasks)) return *found;
  std::vector<std::string_view> names;
  for (const Task& known : kTasks) names.push_back(known.name);
  fail("unknown evaluation \"", name, "\"; known are ", list(names));
}

}  // namespace natslm::eval
