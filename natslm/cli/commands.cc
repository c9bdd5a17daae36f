// The one table of commands. A new one: its declaration, its line, its file in CMakeLists.txt.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/command.h"

namespace natslm::cli {

void add_info(CLI::App& app, Context& context);

void add_commands(CLI::App& app, Context& context) {
  add_info(app, context);
}

}  // namespace natslm::cli
