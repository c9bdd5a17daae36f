// What every reader promises of every input: it works, or throws natslm::Error with one line. Fuzz
// targets call it; anything else ends the program, which is what a fuzzer looks for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "natslm/base/error.h"

namespace natslm {

template <class Call>
void works_or_throws_one_line(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    const std::string_view message = error.what();
    if (message.empty() || message.find('\n') != std::string_view::npos) {
      std::fprintf(stderr, "\nnot a message of one line: %s\n", error.what());
      std::abort();
    }
  }
}

}  // namespace natslm
