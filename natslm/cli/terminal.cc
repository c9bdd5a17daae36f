// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace natslm::cli {

namespace {

std::string_view environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace

Terminal terminal_of(int file_descriptor) {
  Terminal terminal;
  terminal.interactive = isatty(file_descriptor) && environment("TERM") != "dumb";
  terminal.colour = terminal.interactive && environment("NO_COLOR").empty();
  winsize size{};
  if (const int columns = std::atoi(environment("COLUMNS").data()); columns > 0) {
    terminal.width = columns;
  } else if (terminal.interactive && ioctl(file_descriptor, TIOCGWINSZ, &size) == 0 &&
             size.ws_col > 0) {
    terminal.width = size.ws_col;
  }
  terminal.width = std::clamp(terminal.width, 20, 400);
  return terminal;
}

}  // namespace natslm::cli
