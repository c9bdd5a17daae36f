// What the terminal can do. Honours NO_COLOR (no-color.org), COLUMNS and TERM=dumb.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace natslm::cli {

struct Terminal {
  bool interactive = false;  // a person may be watching: bars may be redrawn in place
  bool colour = false;       // escape sequences for colour are welcome
  int width = 100;           // columns
};

// Facts about a file descriptor: 1 is standard output, 2 standard error.
Terminal terminal_of(int file_descriptor);

}  // namespace natslm::cli
